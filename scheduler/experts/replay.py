"""Runs a policy against a trace: what a cache of so many experts would have had, and how long the layers would have
taken.

The expert layers only: attention and the rest of a model are the same whatever the policy. With costs each layer is
planned by the scheduler, whose simulated makespan counts, and what a miss brings in is what the plan moved. Without
costs every miss is brought, and there are hits and bytes but no seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...memory.errors import UsageError
from .account import Account, Causes, PhaseResult
from .cache import CacheSetting, CacheStatistics, ExpertCache, Origin
from .events import Event
from .idle import IdleTime
from .layerscheduler import LayerPlan, LayerScheduler
from .policies.policy import Policy
from .prefetch import Prefetched, Prefetcher, PrefetchStatistics
from .shape import Routing
from .timelines import ExpertTask
from .trace import IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySetting:
    """What is replayed on.

    Args:
        cache: Of the tier that computes: the device's memory, or the host's where there is no device.
        host: Experts that the host holds above the disk, where there is a device; None for all.
        prefetch: Experts of the next layer that may be prefetched at a time; 0 for none.
        between_s: Time between the experts of one layer and those of the next, in which links are idle.
        fill: Whether a device apart is brought what the CPU has computed, in idle time.
    """

    cache: CacheSetting
    host: int | None = None
    prefetch: int = 0
    between_s: float = 0.0
    fill: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """What came of it."""

    prefill: PhaseResult
    decode: PhaseResult
    cache: CacheStatistics
    prefetching: PrefetchStatistics | None
    """None where nothing was to be prefetched."""


def replay(
    routing: Routing,
    events: Sequence[Event],
    policy: Policy,
    setting: ReplaySetting,
    *,
    scheduler: LayerScheduler | None = None,
    expert_nbytes: int = 0,
) -> ReplayResult:
    """Replay events from a cold start.

    Args:
        routing: The model's.
        events: In order.
        policy: That has seen nothing yet.
        setting: What it runs on.
        scheduler: For seconds. May be used for several replays, and is faster then.
        expert_nbytes: For bytes.

    Raises:
        UsageError: experts could be fetched ahead, and there are no costs to tell what that gains.
    """
    run = _Replay(routing, policy, setting, scheduler)
    for event in events:
        run.step(event)
    return ReplayResult(
        prefill=run.accounts["prefill"].result(expert_nbytes),
        decode=run.accounts["decode"].result(expert_nbytes),
        cache=run.cache.statistics(),
        prefetching=run.prefetcher.statistics() if run.prefetcher is not None else None,
    )


class _Replay:
    def __init__(
        self, routing: Routing, policy: Policy, setting: ReplaySetting, scheduler: LayerScheduler | None
    ) -> None:
        if setting.prefetch and scheduler is None:
            raise UsageError("prefetching is decided by simulated seconds: name a machine and the sizes of experts")
        self.cache = ExpertCache(routing, setting.cache, policy)
        self.accounts = {"prefill": Account(), "decode": Account()}
        self.prefetcher = Prefetcher(scheduler, most=setting.prefetch) if scheduler and setting.prefetch else None
        self._policy = policy
        self._setting = setting
        self._scheduler = scheduler
        self._separate = scheduler is None or scheduler.costs.separate
        self._host: ExpertCache | None = None
        if self._separate and setting.host is not None and setting.host < routing.total:
            self._host = ExpertCache(routing, replace(setting.cache, capacity=setting.host), policy)
        self._causes = Causes(routing)
        self._prefetched: tuple[Prefetched, ...] = ()

    def step(self, event: Event) -> None:
        """One layer."""
        self._policy.seen(event)
        for cache in (self.cache, self._host):
            if cache is not None:
                cache.seen(event)
        account = self.accounts[event.phase]
        tasks = self._tasks(event.layer, event.experts, event.rows)
        ahead, self._prefetched = self._prefetched, ()
        here = _with(tasks, ahead)
        near = {task.expert: task.on_device if self._separate else task.on_host for task in here}
        self._causes.count(account, event, self.cache, (near[expert] for expert in event.experts.tolist()))
        if self._scheduler is None:
            missed = [task.expert for task in here if not task.on_device]
            account.copies += len(missed)
            self._keep(event, missed, Origin.MISSED)
        else:
            plan = self._scheduler.plan(here)
            if self.prefetcher is not None:
                self.prefetcher.settle(tasks, ahead)
            account.seconds += plan.seconds
            account.copies += len(plan.copied)
            account.reads += len(plan.read)
            account.computed_by_cpu += len(plan.computed_by_cpu)
            self._move(event, plan, ahead)
            self._use_idle_time(account, event, plan)
        self._causes.passed(event, self.cache)

    def _tasks(self, layer: int, experts: IntArray, rows: IntArray) -> list[ExpertTask]:
        """Experts, and where they are without prefetching."""
        held = self.cache.held[layer]
        on_device = held[experts] if self._separate else np.zeros(len(experts), np.bool_)
        if self._separate:
            on_host = self._host.held[layer, experts] if self._host is not None else np.ones(len(experts), np.bool_)
        else:
            on_host = held[experts]
        columns = (experts.tolist(), rows.tolist(), on_device.tolist(), on_host.tolist())
        return [
            ExpertTask(expert=expert, rows=count, on_device=device, on_host=host)
            for expert, count, device, host in zip(*columns, strict=True)
        ]

    def _move(self, event: Event, plan: LayerPlan, ahead: Sequence[Prefetched]) -> None:
        """Keep what the layer has brought."""
        brought = {each.expert: each.mover for each in ahead}
        needed = set(event.experts.tolist())
        read = [*plan.read, *(expert for expert, mover in brought.items() if mover == "disk" and expert in needed)]
        copied = [*plan.copied, *(expert for expert, mover in brought.items() if mover == "link" and expert in needed)]
        nearest = copied if self._separate else read
        self._keep(event, nearest, Origin.MISSED)
        if self._host is not None:
            _take(self._host, event, read, Origin.MISSED)

    def _keep(self, event: Event, experts: Sequence[int], origin: Origin) -> list[int]:
        wanted = [expert for expert in experts if not self.cache.held[event.layer, expert]]
        return _take(self.cache, event, wanted, origin)

    def _use_idle_time(self, account: Account, event: Event, plan: LayerPlan) -> None:
        """Bring what the CPU has computed and the cache would have, then what the next layer is expected to need."""
        assert self._scheduler is not None, "without costs nobody knows what is idle"
        idle = IdleTime.behind(plan, self._scheduler.costs, self._setting.between_s)
        if self._setting.fill and self._separate and event.phase == "decode":
            for expert in plan.computed_by_cpu:
                if not idle.has_room("link"):
                    break
                if self._keep(event, [expert], Origin.FILLED):
                    account.seconds += idle.slows_by_s("link")
                    account.copies += 1
                    idle.take("link")
        if self.prefetcher is None or event.guesses is None or event.guessed_rows is None:
            return
        expected = self._tasks(event.layer + 1, event.guesses, event.guessed_rows)
        ranks = (
            None
            if event.guess_ranks is None
            else dict(zip(event.guesses.tolist(), event.guess_ranks.tolist(), strict=True))
        )
        self._prefetched = self.prefetcher.choose(expected, idle, ranks=ranks)
        for each in self._prefetched:
            account.seconds += each.cost_s
            account.copies += each.mover == "link"
            account.reads += each.mover == "disk"


def _with(tasks: Sequence[ExpertTask], ahead: Sequence[Prefetched]) -> list[ExpertTask]:
    """Tasks, with what was prefetched where it is now."""
    if not ahead:
        return list(tasks)
    movers = {each.expert: each.mover for each in ahead}
    return [
        ExpertTask(
            expert=task.expert,
            rows=task.rows,
            on_device=task.on_device or movers.get(task.expert) == "link",
            on_host=task.on_host or movers.get(task.expert) == "disk",
        )
        for task in tasks
    ]


def _take(cache: ExpertCache, event: Event, experts: Sequence[int], origin: Origin) -> list[int]:
    """A prompt fills what is free, and evicts nothing: it uses nearly everything, and would flush the rest."""
    if event.phase == "prefill":
        return cache.fill_free(event.layer, experts)
    taken = cache.admit(event.layer, experts, needed=event.experts, origin=origin)
    return [expert for expert, _ in taken]

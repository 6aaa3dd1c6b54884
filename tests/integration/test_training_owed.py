"""Experts in one tensor that had no token: their masters and states do not move, and all bits are those of steps that
were made at once."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from training_cases import TEXT, VOCAB, cosine, talk, warmup
from training_reference import PLENTY, Case, Reference, Streamed, Trace, run, scheduled, smallest
from zoo import differences, token_ids
from zoo.decoders import COMMON

import penstock
from penstock.runtime.training import preparing, room, selection
from penstock.runtime.training.owing import Owing
from penstock.runtime.training.shardfiles import ShardFiles
from penstock.runtime.training.shards import GRAIN, Shard
from penstock.runtime.training.updater import Updater
from penstock.scheduler.owed import MOST, Idleness

pytestmark = [
    pytest.mark.usefixtures("one_thread", "states_on_disk"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
EXPERTS, STEPS = 16, 20


@pytest.fixture
def states_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a tiny model would stay in host memory, under any budget, and no step would move any."""
    plain = preparing.plan_room
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", GRAIN)
    monkeypatch.setattr(
        preparing, "plan_room", lambda *args, **options: replace(plain(*args, **options), resident=frozenset())
    )


def mixtral(layers: int = 2) -> nn.Module:
    sizes: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, **sizes, **COMMON))


def gpt_oss() -> nn.Module:
    """Transposed, with biases, whose rows are passed by with no gradient of their own kind."""
    sizes: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 16, "sliding_window": 6},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, **sizes, **COMMON))


def two_tokens(model: Any, batch: int) -> Tensor:
    """For four experts of a layer, at most."""
    ids = token_ids(seed=batch, batch=1, length=2, vocab=VOCAB)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


ADAMW = Case(
    name="adamw",
    make=partial(mixtral, 6),  # more than the slots that the least budget has
    losses=(two_tokens,),
    optimizer=penstock.AdamW(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, groups={"*norm*": {"weight_decay": 0.0}}),
    dtype=torch.bfloat16,
    batches=2,
    steps=STEPS,
    schedule=cosine,
)
SGD = Case(
    name="sgd",
    make=mixtral,
    losses=(two_tokens,),
    optimizer=penstock.SGD(lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    steps=STEPS,
    schedule=warmup,
)
LION = Case(
    name="lion",
    make=gpt_oss,
    losses=(two_tokens,),
    optimizer=penstock.Lion(lr=1e-3, weight_decay=0.1),
    steps=STEPS,
)


class Noting(Reference):
    """The reference, and which experts each step used, by parameter."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.chosen: list[list[dict[str, set[int]]]] = [[]]
        """In each forward, by a token; not all of them have an influence on the loss."""
        self.touched: list[dict[str, set[int]]] = []
        """Experts whose gradient has a bit set; -0 has one."""
        self._chosen: dict[str, set[int]] = {}
        for path, module in self.model.named_modules():
            if hasattr(module, "gate_up_proj"):
                module.register_forward_pre_hook(partial(self._note, path), with_kwargs=True)
        self._fused = [name for name in self.parameters if name.endswith(("gate_up_proj", "down_proj"))]

    def _note(self, path: str, module: Any, args: Any, kwargs: Any) -> None:
        (chosen,) = (each for each in (*args, *kwargs.values()) if not each.is_floating_point())
        for name in ("gate_up_proj", "down_proj"):
            self._chosen[f"{path}.{name}"] = set(chosen.unique().tolist())

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        super().backward(loss, retain_graph=retain_graph)
        self.chosen[-1].append(dict(self._chosen))

    def step(self) -> Tensor:
        self.touched.append({name: self._touched(self.masters[name].grad) for name in self._fused})
        self.chosen.append([])
        return super().step()

    def _touched(self, grad: Any) -> set[int]:
        return set(grad.flatten(1).view(torch.int32).any(dim=1).nonzero()[:, 0].tolist())


def reference(case: Case) -> tuple[Noting, Trace]:
    """From beginning to end."""
    trainer, trace = Noting(case), Trace()
    torch.manual_seed(7)
    run(case, trainer, scheduled(case, trainer.optimizer), range(case.steps), trace)
    return trainer, trace


def prepare(case: Case, folder: Path, placement: str, **options: Any) -> Streamed:
    """Weights that stay in host memory, that stream, or that have their home there beside a device apart."""

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.prepare(
            case.build(),
            optimizer=case.optimizer,
            disk=folder,
            max_memory=memory,
            device=device,
            accumulate=case.accumulate,
            **options,
        )

    if placement == "apart":
        device = "emulated:h2d=20GiB/s,d2h=20GiB/s"
        with pytest.raises(penstock.DoesNotFitError) as caught:
            place({"host": PLENTY, "device": 1}, device)
        return Streamed(*place({"host": PLENTY, "device": caught.value.needed_nbytes}, device))
    device, memory = smallest(place, placement)
    return Streamed(*place(memory, device))


@dataclass(kw_only=True)
class Moved:
    """Shards, each as often as it was read and written."""

    read: Counter[int]
    written: Counter[int]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Moved:
    found = Moved(read=Counter(), written=Counter())
    read, begin = ShardFiles.read, ShardFiles.begin

    def noting_read(self: ShardFiles, shard: Shard, into: memoryview) -> Any:
        found.read[shard.id] += 1
        return read(self, shard, into)

    def noting_begin(self: ShardFiles, shard: Shard) -> Any:
        found.written[shard.id] += 1
        return begin(self, shard)

    monkeypatch.setattr(ShardFiles, "read", noting_read)
    monkeypatch.setattr(ShardFiles, "begin", noting_begin)
    return found


def foreseen(case: Case, trainer: Streamed, noted: Noting) -> tuple[Counter[int], int]:
    """How often each shard moves in all steps and in the commit after them, and how often one was left out."""
    training = trainer.optimizer.training
    names = [each.name for each in training.trained]
    arrays = 1 + len(case.optimizer.kernel.states_of(case.optimizer.kernel.hyper_of(case.optimizer.defaults())))
    expert: dict[int, tuple[str, set[int]]] = {}
    """By shard, the experts that it has elements of: two where one of them ends within a page."""
    for shard in training._shards:
        (piece, *_) = shard.pieces
        each = training.trained[piece.parameter]
        if each.experts:
            size = each.elements // EXPERTS
            expert[shard.id] = each.name, {at // size for at in range(piece.start, piece.stop)}
    idleness: dict[int, Idleness] = {}
    moves, owes, left = Counter[int](), Counter[int](), 0
    for step in range(case.steps):
        for seen in noted.chosen[step]:
            for number, (name, which) in expert.items():
                if owes[number] and which & seen[name]:
                    moves[number] += 1
                    owes[number] = 0
        for block in {shard.block for shard in training._shards}:
            shards = [shard for shard in training._shards if shard.block == block]
            idle = {
                s.id for s in shards if s.id in expert and not expert[s.id][1] & noted.touched[step][expert[s.id][0]]
            }
            spared = sum(2 * arrays * s.array_nbytes for s in shards if s.id in idle)
            again = idleness.setdefault(block, Idleness()).step(idle)
            if spared * (1 - again) <= 2 * training._weights.moving_nbytes(block):
                idle = set()
            left += len(idle)
            for shard in shards:
                owes[shard.id] = owes[shard.id] + 1 if shard.id in idle else 0
                moves[shard.id] += shard.id not in idle
    assert max(owes.values()) <= MOST
    moves.update(number for number, owed in owes.items() if owed)
    assert {names[piece.parameter] for shard in training._shards for piece in shard.pieces} == set(names)
    return moves, left


@pytest.mark.parametrize(
    ("case", "placement", "options"),
    [
        (ADAMW, "smallest", {}),
        (SGD, "resident", {}),
        (SGD, "apart", {"update_on": "device"}),
        (LION, "smallest", {"updates": "backward"}),
    ],
    ids=lambda each: getattr(each, "name", None) or str(each),
)
def test_untouched_experts_stay_on_disk_and_all_bits_are_the_references(
    case: Case, placement: str, options: dict[str, Any], tmp_path: Path, moved: Moved
) -> None:
    noted, expected = reference(case)
    trainer, trace = prepare(case, tmp_path / "run", placement, **options), Trace()
    try:
        assert (trainer.model.penstock.machinery.layout.front.slots > 0) is (placement != "resident")
        moved.read.clear()
        moved.written.clear()  # what the beginning of the run has written
        torch.manual_seed(7)
        run(case, trainer, scheduled(case, trainer.optimizer), range(case.steps), trace)
        if options.get("updates") == "backward":
            trace.norms = expected.norms  # it has none
        assert differences(expected.outputs(), trace.outputs()) == []
        assert differences(noted.state(), trainer.state()) == []
        moves, left = foreseen(case, trainer, noted)
        assert left > 0
        assert trainer.optimizer.training.catch_up.statistics().left == left
        assert moved.read == moves
        assert moved.written == moves
    finally:
        penstock.close(trainer.model)


class Elsewhere:
    """Looks at all experts of a layer in its forward, as no function of experts does."""

    def __init__(self, model: Any) -> None:
        self.seen: list[Tensor] = []
        self._experts = model.model.layers[1].mlp.experts
        self._calls = 0
        model.model.layers[1].register_forward_pre_hook(self._look)

    def _look(self, *_: object) -> None:
        self._calls += 1
        if self._calls % 5 == 0:
            with torch.no_grad():
                self.seen.append(self._experts.down_proj.float().sum(dim=(1, 2)))


@pytest.mark.parametrize("placement", ["smallest"])
def test_whoever_looks_at_weights_or_commits_finds_no_expert_behind(
    placement: str, tmp_path: Path, moved: Moved
) -> None:
    case = replace(ADAMW, name="looking", batches=1, steps=6, between=talk)
    noted = Noting(case)
    there = Elsewhere(noted.model)
    expected, trace = Trace(), Trace()
    torch.manual_seed(7)
    schedule = scheduled(case, noted.optimizer)
    trainer = prepare(case, tmp_path / "run", placement, activations="recompute")
    here = Elsewhere(trainer.model)
    ours = scheduled(case, trainer.optimizer)
    part = trainer.model.model.layers[0].mlp
    try:
        for step in range(case.steps):
            torch.manual_seed(step)
            run(case, noted, schedule, range(step, step + 1), expected)
            torch.manual_seed(step)
            run(case, trainer, ours, range(step, step + 1), trace)
            if step == 2:
                with trainer.model.penstock.gathered(part):
                    lent = {name: value.detach().clone() for name, value in part.named_parameters()}
                assert differences(dict(noted.model.model.layers[0].mlp.named_parameters()), lent) == []
            if step == 3:
                assert differences(noted.model.state_dict(), dict(trainer.model.state_dict())) == []
                assert trainer.optimizer.training.catch_up.statistics().waiting == 0
            if step == 4:
                penstock.save(trainer.model, trainer.optimizer, scheduler=ours, extra={"next": 5})
        assert differences(expected.outputs(), trace.outputs()) == []
        assert len(here.seen) == len(there.seen) > 1
        assert all(map(torch.equal, here.seen, there.seen))
        assert trainer.optimizer.training.catch_up.statistics().left > 0
        assert differences(noted.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)
    model, optimizer = penstock.resume(
        tmp_path / "run", model=case.build(), max_memory={"host": PLENTY}, device="cpu", scheduler=cosine
    )
    try:  # what the commit has: the last step is made again
        torch.manual_seed(5)
        run(case, Streamed(model, optimizer), optimizer.scheduler, range(5, 6), again := Trace())
        assert differences(expected.since(5, case).outputs(), again.outputs()) == []
        assert differences(noted.state(), Streamed(model, optimizer).state()) == []
    finally:
        penstock.close(model)


def test_a_step_that_is_skipped_is_owed_as_skipped(tmp_path: Path) -> None:
    def loss(model: Any, batch: int) -> Tensor:
        return two_tokens(model, batch) * (float("inf") if batch == 3 else 1.0)

    case = replace(ADAMW, name="skipping", batches=1, losses=(loss,), steps=7, schedule=None)
    whole = Reference(replace(case, steps=3))
    run(case, whole, None, range(3), Trace())
    run(case, whole, None, range(4, 7), Trace())
    trainer = prepare(case, tmp_path / "run", "resident", nonfinite="skip")
    try:
        run(case, trainer, None, range(7), Trace())
        assert trainer.optimizer.training.catch_up.statistics().left > 0
        assert differences(whole.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_a_run_that_was_cut_without_regard_to_experts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SGD, name="older", steps=4, schedule=None)
    noted, _ = reference(case)
    with monkeypatch.context() as patched:
        patched.setattr(selection, "experts_of", lambda trained, by_expert: [0] * len(trained))
        trainer = prepare(case, tmp_path / "run", "resident")
        run(case, trainer, None, range(2), Trace())
        penstock.save(trainer.model, trainer.optimizer).wait()
        penstock.close(trainer.model)
    model, optimizer = penstock.resume(tmp_path / "run", model=case.build(), max_memory={"host": PLENTY}, device="cpu")
    try:
        run(case, Streamed(model, optimizer), None, range(2, 4), Trace())
        assert differences(noted.state(), Streamed(model, optimizer).state()) == []
    finally:
        penstock.close(model)


def test_no_shard_owes_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.runtime.training.owing.MOST", 2)
    most: list[int] = []
    choose = Owing.choose

    def noted(self: Owing, *args: Any) -> Any:
        found = choose(self, *args)
        most.append(max(self._ledger.owed(number) for number in self._pieces))
        return found

    monkeypatch.setattr(Owing, "choose", noted)
    case = replace(SGD, name="at most", steps=6)
    expected, _ = reference(case)
    trainer = prepare(case, tmp_path / "run", "resident")
    try:
        run(case, trainer, scheduled(case, trainer.optimizer), range(6), Trace())
        assert max(most) == 2
        assert differences(expected.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_an_interrupt_in_a_forward_waits_for_what_is_written_where_the_layer_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    wait = Updater._wait

    def interrupted(self: Updater, ready: Any, what: str) -> None:
        if "owe" in what:
            waits.append(what)
            if len(waits) == 1:
                raise KeyboardInterrupt
        wait(self, ready, what)

    monkeypatch.setattr(Updater, "_wait", interrupted)
    case = replace(ADAMW, name="interrupted", batches=1, steps=6)
    expected, trace = reference(case)
    trainer, ours = prepare(case, tmp_path / "run", "smallest"), Trace()
    schedule = scheduled(case, trainer.optimizer)
    interrupts = 0
    try:
        for step in range(6):
            try:
                run(case, trainer, schedule, range(step, step + 1), ours)
            except KeyboardInterrupt:
                interrupts += 1
                run(case, trainer, schedule, range(step, step + 1), ours)
        assert interrupts == 1
        assert len(waits) > 1
        assert differences(trace.outputs(), ours.outputs()) == []
        assert differences(expected.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


class Turn:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.wanted = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.wanted.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_forward_waits_for_what_another_thread_has_made_of_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(ADAMW, name="two threads", batches=1, steps=4)
    expected, _ = reference(case)
    with torch.no_grad():
        wanted = [expected.model(**ids).logits for ids in looks()]
    trainer = prepare(case, tmp_path / "run", "smallest")
    run(case, trainer, scheduled(case, trainer.optimizer), range(4), Trace())
    trainer.optimizer.training._updater.wait()
    catch_up = trainer.optimizer.training.catch_up
    part = trainer.model.model.layers[0].mlp
    behind = [parameter for parameter in part.parameters() if catch_up.behind(parameter)]
    assert behind
    catch_up._turn = turn = Turn(catch_up._turn)
    asked, go = threading.Event(), threading.Event()
    put = Updater._put

    def held(self: Updater, job: Any, *, urgent: bool) -> None:
        if job.catches_up and not asked.is_set():  # nothing is owed any more, and nothing has been made
            asked.set()
            assert go.wait(60)
        put(self, job, urgent=urgent)

    monkeypatch.setattr(Updater, "_put", held)
    found: list[Tensor] = []

    def gather() -> None:
        with trainer.model.penstock.gathered(part):
            pass

    def forward() -> None:
        with torch.no_grad():
            found.extend(trainer.model(**ids).logits for ids in looks())

    threads = [threading.Thread(target=gather), threading.Thread(target=forward)]
    try:
        threads[0].start()
        assert asked.wait(60)
        assert all(catch_up.behind(parameter) for parameter in behind)
        threads[1].start()
        assert turn.wanted.wait(60), "the forward did not ask for its turn"
        assert not found
        go.set()
        for thread in threads:
            thread.join(60)
        assert not any(catch_up.behind(parameter) for parameter in behind)
        assert all(map(torch.equal, wanted, found))
        assert len(found) == len(wanted)
    finally:
        go.set()
        penstock.close(trainer.model)


def looks() -> list[dict[str, Tensor]]:
    """Of so many tokens that each expert has some."""
    return [{"input_ids": token_ids(seed=seed, batch=4, length=32, vocab=VOCAB)} for seed in (1, 2)]


def test_what_falls_behind_while_it_is_gathered_is_caught_where_it_is_lent(tmp_path: Path) -> None:
    case = replace(ADAMW, name="gathering", batches=1, steps=4)
    expected, _ = reference(case)
    trainer = prepare(case, tmp_path / "run", "smallest")
    schedule = scheduled(case, trainer.optimizer)
    layer = trainer.model.model.layers[1]
    machinery = trainer.model.penstock._machinery
    blocks = machinery.layout.leases["model.layers.1.mlp.experts"]
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        leases = [machinery.session.lend(block, observed=False) for block in blocks]
        seen.append(layer.mlp.experts.down_proj + 0)
        machinery.session.release(leases)

    try:
        run(case, trainer, schedule, range(3), Trace())
        two_tokens(trainer.model, 3).backward()
        with trainer.model.penstock.gathered(layer.mlp):
            assert type(layer.mlp.experts.down_proj) is nn.Parameter  # a copy, to be used as it is
            trainer.optimizer.step()
            assert trainer.optimizer.training.catch_up.behind(layer.mlp.experts.down_proj)
            layer.mlp.gate.register_forward_hook(look)
            with torch.no_grad():
                two_tokens(trainer.model, 3)
        assert torch.equal(seen[0], expected.model.model.layers[1].mlp.experts.down_proj)
    finally:
        penstock.close(trainer.model)

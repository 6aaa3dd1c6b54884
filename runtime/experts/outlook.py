"""What experts of a layout will miss."""

from __future__ import annotations

from ...memory.errors import UsageError
from ...scheduler.cost import CostModel
from ...scheduler.experts.costs import expert_costs
from ...scheduler.experts.forecast import ExpertForecast, decoded_together, foresee_experts
from ...scheduler.experts.shape import ExpertShape
from ...scheduler.experts.trace import Trace
from .placed import PlacedExperts


def outlook_of(
    placed: PlacedExperts,
    shape: ExpertShape,
    cost: CostModel | None,
    trace: Trace,
    *,
    assumed: bool,
    batch: int | None = None,
    exact: bool = False,
) -> ExpertForecast:
    """Replay what a run would do; see `foresee_experts`.

    Args:
        placed: The experts of the layout.
        shape: Of one of them.
        cost: Of the machine; None where it has not been measured.
        trace: Of the same routing.
        assumed: Whether it was made up.
        batch: Sequences that are continued together; None for as many as in the trace.
        exact: Whether one processor computes everything.

    Raises:
        UsageError: the trace is of another routing, or of another batch.
    """
    if trace.header.routing != placed.routing:
        theirs, ours = trace.header.routing, placed.routing
        raise UsageError(
            f"the trace is of {theirs.layers} layers of {theirs.experts} experts, {theirs.top_k} per token, and this "
            f"model has {ours.layers} of {ours.experts}, {ours.top_k} per token: record one of this model "
            "(penstock moe record)"
        )
    recorded = decoded_together(trace)
    if batch is not None and recorded and recorded != batch:
        raise UsageError(
            f"the trace continues {recorded} sequences at a time, and {batch} are asked about, which use other "
            f"experts: record one with {batch}, ask about {recorded}, or leave it out"
        )
    costs = None if cost is None else expert_costs(cost, shape)
    return foresee_experts(
        trace,
        assumed=assumed,
        capacity=placed.capacity,
        host=None if placed.host_has_all else placed.host_capacity,
        read_nbytes=placed.read_nbytes,
        copied_nbytes=shape.nbytes,
        costs=costs if costs is None or costs.separate is placed.apart else None,
        apart=placed.apart,
        exact=exact,
    )

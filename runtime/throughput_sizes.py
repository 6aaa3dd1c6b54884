"""What sequences take beside the weights, and what there is for them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from ..memory.capacity import host_capacity
from ..memory.errors import PenstockError
from ..memory.ledger import process_ledger
from ..scheduler.experts.shape import ExpertShape, Routing
from ..scheduler.microbatches import Footprint
from ..scheduler.mixture import Mixture
from ..scheduler.sizes import Workload
from .cachesize import cache_size
from .experts.layers import find_expert_layers, shape_of
from .headroom import FRAMEWORK, headroom_nbytes, kv_nbytes
from .widening import LANE_NBYTES

logger = logging.getLogger(__name__)

SLACK: Final = 1.15
"""Caches grow by copying; this is what the allocator keeps of the old ones."""
_HELD: Final = 0.55
"""The part of a prefill's activations that stays while others have their turn in the middle of a layer."""


def footprint_of(config: Any, dtype: torch.dtype, *, reserved: bool) -> Footprint:
    """What sequences of a model take, estimated from its config.

    `reserved`: keys and values lie in buffers that are made once; else they grow.
    """

    def needs(tokens: int, sequences: int) -> int:
        return headroom_nbytes(config, dtype, context=tokens, batch=sequences)

    per_token = needs(3, 1) - needs(2, 1)
    per_sequence = needs(1, 2) - needs(1, 1) - per_token
    kept = kv_nbytes(config, dtype, context=3, batch=1) - kv_nbytes(config, dtype, context=2, batch=1)
    activations = per_token - kept
    kv = _kv_nbytes_per_token(config, dtype)
    return Footprint(
        kv_nbytes_per_token=kv if reserved else kv * SLACK,
        activation_nbytes_per_token=activations * SLACK,
        held_nbytes_per_token=activations * _HELD,
        logits_nbytes_per_sequence=max(per_sequence, 0),
    )


def rehearsed_footprint(
    path: str,
    estimate: Footprint,
    *,
    tokens: int,
    dtype: str | torch.dtype,
    on_cpu: bool,
    trust_remote_code: bool,
    reserved: bool,
) -> Footprint:
    """`estimate` with the keys and values, or states, of a sequence of so many tokens as they are in a run of the model
    on tensors without bytes. Takes seconds.

    Activations stay estimated: the peak of such a run is often that of the output layer, which a streamed model takes
    in pieces.
    """
    from .sizing import measure_sizes  # imports half of torch again

    try:
        sizes = measure_sizes(
            path,
            workload=Workload(batch=1, context=max(tokens, 2)),
            dtype=dtype,
            on_cpu=on_cpu,
            trust_remote_code=trust_remote_code,
        )
    except PenstockError as error:
        logger.info("sizes are estimated from the config: %s", error)
        return estimate
    if not sizes.most.kv:
        return estimate
    kv = sizes.most.kv / sizes.workload.context
    return replace(estimate, kv_nbytes_per_token=kv if reserved else kv * SLACK)


def with_buffers(footprint: Footprint, wide_from: int | None) -> Footprint:
    """`footprint` with what each lane keeps where products of so many rows are multiplied in fp32; None is none."""
    return footprint if wide_from is None else replace(footprint, lane_nbytes=LANE_NBYTES)


def with_meetings(footprint: Footprint, shape: ExpertShape, routing: Routing) -> Footprint:
    """`footprint` of a mixture of experts. A layer of them computes the tokens of all micro-batches of a sweep at once,
    so that each expert is brought once, and what that takes is there for all of them: for each token and expert of its
    own the values that go in, both results of products, what lies between, and what comes out, weighted once more. That
    is so of prompts and of tokens that go on."""
    wide = 2 if shape.gated else 1
    each = routing.top_k * (3 * shape.hidden + (wide + 1) * shape.ffn) * shape.itemsize * SLACK
    held = footprint.held_nbytes_per_token + each
    most = max(footprint.activation_nbytes_per_token, held)
    return replace(
        footprint, activation_nbytes_per_token=most, held_nbytes_per_token=held, meeting_nbytes_per_token=each
    )


def with_mixture(footprint: Footprint, model: nn.Module) -> tuple[Footprint, Mixture | None]:
    """`footprint` of a model, with or without bytes, and its experts, of no known time; None where they cannot be
    blocks of their own."""
    parameters = dict(model.named_parameters())
    found = find_expert_layers(model, {name: parameter.nbytes for name, parameter in parameters.items()})
    if found is None:
        return footprint, None
    nbytes = sum(parameters[name].nbytes for name in found.names)
    mixture = Mixture(share=found.routing.top_k / found.routing.experts, nbytes=nbytes)
    return with_meetings(footprint, shape_of(model, found.layers[0]), found.routing), mixture


def _kv_nbytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Of each token, given or new. An encoder has those that are given, its decoder those that are new."""
    size = cache_size(config)
    return max(size.token_elements, size.source_elements) * torch.empty((), dtype=dtype).element_size()


def free_host_nbytes() -> int:
    """Host memory that sequences may take: what can be allocated and no model has reserved, less what torch and
    libraries take later."""
    return max(0, host_capacity().available_nbytes - process_ledger().untouched("host") - FRAMEWORK)

"""What a commit says beside the blocks: how far the run is, hyperparameters, random numbers, the caller's own state."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import torch

from ...memory.errors import StoreVersionError, UsageError
from ...scheduler.updating import ON_CPU, UpdateShares
from .saves import ForwardSaves

FORMAT = 1
Activations = Literal["auto", "keep", "recompute", "offload"]
Updates = Literal["step", "backward"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, to be written into commits."""

    source: str | None = None
    """The checkpoint; None for a module that was built."""
    dtype: str = "auto"
    adapters: str | None = None
    """Settings of the adapters that were put into it, as adapter_config.json has them."""
    frozen: bool = False
    """Whether what is trained lies beside frozen weights, in host memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How steps are taken."""

    accumulate: int = 1
    """Backward passes of each."""
    skip_nonfinite: bool = False
    """Whether a step without a finite gradient is left out, rather than an error."""
    activations: Activations = "auto"
    """keep: in memory. recompute: layers run again in backward. offload: to host memory beside a device apart, and to
    disk; nothing is made again. auto: where weights are streamed a plan decides, by what each costs; else keep."""
    device_is_named: bool = True
    """Whether the budget of a device apart was named: what it has left may then hold activations."""

    shares: UpdateShares = ON_CPU
    """What a device apart updates; the CPU does the rest."""
    saves: ForwardSaves | None = None
    """What a forward leaves for backward; None where nothing is known of it."""
    updates: Updates = "step"
    """backward: a block is updated as soon as its last gradient is there. step: when all are."""

    def check(self, max_grad_norm: float | None) -> None:
        """See that updates may begin when they are to.

        Raises:
            UsageError: they would begin before it is known what they are.
        """
        if self.updates == "backward" and (max_grad_norm is not None or self.skip_nonfinite):
            what = f"max_grad_norm={max_grad_norm}" if max_grad_norm is not None else 'nonfinite="skip"'
            raise UsageError(
                f'updates="backward" begins before all gradients are there, and {what} needs all of them first: leave '
                "one of the two out"
            )

    def check_frozen(self) -> None:
        """See that they make sense where adapters are trained beside frozen weights.

        Raises:
            UsageError: they do not.
        """
        if self.updates == "backward":
            raise UsageError(
                'updates="backward" makes room for gradients of weights that stream, and those of adapters stay in '
                'memory, few as they are: leave it out, or say "step"'
            )

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UsageError(f"accumulate is {self.accumulate}: a step needs 1 backward pass at least")
        for name, value, known in (
            ("activations", self.activations, get_args(Activations)),
            ("updates", self.updates, get_args(Updates)),
        ):
            if value not in known:
                raise UsageError(f"{name} is {value!r}: use {', '.join(known)}")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata document of one commit."""

    format: int = FORMAT
    names: tuple[str, ...]
    """Of the trained parameters."""
    steps: tuple[int, ...]
    """Updates of each."""
    mathematics: str
    """Name of the optimizer."""
    groups: tuple[dict[str, Any], ...]
    """Hyperparameters as they are now, and the numbers of the group's parameters under `params`."""
    random: dict[str, str]
    """State of the generators, by whose it is."""
    buffers: dict[str, bytes] = {}
    """Running statistics and the like, by name."""
    source: str | None = None
    """The checkpoint that the model was loaded from."""
    dtype: str = "auto"
    adapters: str | None = None
    """Settings of the adapters that were put into it, as adapter_config.json has them."""
    frozen: bool = False
    """Whether what is trained lies beside frozen weights, and is no part of their blocks."""
    limit_nbytes: int | None = None
    """What blocks were cut by."""
    max_grad_norm: float | None = None
    scheduler: dict[str, Any] | None = None
    """`state_dict()` of the learning rate's scheduler."""
    extra: Any = None
    """The caller's own: where it is in its data, for one."""


class _Versioned(msgspec.Struct):
    """What a document of any version has."""

    format: int


def encode(state: RunState) -> bytes:
    """As bytes; MessagePack, for JSON has no infinity and no numbers as keys, and schedulers have both.

    Raises:
        UsageError: the caller's state is more than plain data.
    """
    try:
        return msgspec.msgpack.encode(state)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a commit cannot hold this: {error}. Give plain numbers, texts, lists and dicts") from error


def decode(document: bytes) -> RunState:
    """From bytes.

    Raises:
        StoreVersionError: they are of another version.
        UsageError: they are of something else.
    """
    try:
        found = msgspec.msgpack.decode(document, type=_Versioned).format
        if found == FORMAT:
            return msgspec.msgpack.decode(document, type=RunState, strict=True)
    except msgspec.DecodeError as error:
        raise UsageError(
            f"the folder's last commit was not made by penstock.save ({error}): give the folder of a training run"
        ) from error
    other = "newer" if found > FORMAT else "older"
    raise StoreVersionError(
        f"the run was saved in format {found} and this penstock reads {FORMAT}: go on with the {other} penstock that "
        "saved it"
    )


def random_state() -> dict[str, str]:
    """The generators that training draws from: torch's, numpy's, Python's."""
    found = {"torch": _text(torch.get_rng_state().numpy().tobytes())}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    found["numpy"] = msgspec.json.encode([kind, np.asarray(keys).tolist(), position, has_gauss, gauss]).decode()
    found["python"] = msgspec.json.encode(random.getstate()).decode()
    return found


def set_random_state(found: dict[str, str]) -> None:
    """Have the generators go on from there."""
    torch.set_rng_state(_tensor(found["torch"]))
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(found["cuda"]))
    kind, keys, position, has_gauss, gauss = msgspec.json.decode(found["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, following = msgspec.json.decode(found["python"])
    random.setstate((version, tuple(internal), following))


def plain_groups(groups: Sequence[dict[str, Any]], index: dict[int, int]) -> tuple[dict[str, Any], ...]:
    """Parameter groups without tensors."""
    return tuple({**group, "params": [index[id(each)] for each in group["params"]]} for group in groups)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

"""What every system that is simulated has in common, and how its settings are read."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import msgspec

from ...memory.errors import UsageError
from ..hardware import Hardware, Link, Processor
from ..modelshape import ModelShape
from ..work import Work
from .prediction import Prediction


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a system: the `policy` of a workload. Each system has its own fields."""


class System(Protocol):
    """A system whose schedule is known."""

    @property
    def name(self) -> str:
        """As --system takes it."""

    @property
    def summary(self) -> str:
        """One line: what it does."""

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take.

        Raises:
            UsageError: a setting is unknown or cannot be, or the machine lacks what the system needs.
            DoesNotFitError: the model does not fit where the system puts it.
        """


Chosen = TypeVar("Chosen", bound=Options)


def options(work: Work, kind: type[Chosen], system: str) -> Chosen:
    """The settings of a workload, checked.

    Raises:
        UsageError: one is unknown, or of the wrong type.
    """
    try:
        return msgspec.convert(work.policy, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise UsageError(f"policy of {system}: {error}; its settings are {known or 'none'}") from error


def device(hardware: Hardware, system: str) -> tuple[Processor, Link]:
    """The GPU and the link to it.

    Raises:
        UsageError: there is none.
    """
    if hardware.gpu is None or hardware.link is None:
        raise UsageError(f"{system} needs a GPU, and {hardware.name} has none: choose another machine")
    return hardware.gpu, hardware.link


def drives(hardware: Hardware, system: str) -> None:
    """Check that there is a disk.

    Raises:
        UsageError: there is none.
    """
    if not hardware.drives:
        raise UsageError(f"{system} keeps weights on disk here, and {hardware.name} has no drives: add them")


def only(work: Work, system: str, kinds: tuple[str, ...]) -> None:
    """Check what is asked for.

    Raises:
        UsageError: the system does not do that.
    """
    if work.kind not in kinds:
        raise UsageError(f"{system} does not do {work.kind!r}: write {' or '.join(kinds)} as the workload's kind")


def absurd(system: str, what: str, value: Any, wanted: str) -> UsageError:
    """What is wrong with a setting."""
    return UsageError(f"policy of {system}: {what} is {value!r}: write {wanted}")

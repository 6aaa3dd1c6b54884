"""Where a run is in its data: a small record that goes into a commit, and from which batches go on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ....memory.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """What the order of sequences depends on."""

    tokens: str
    """Digest of all tokens."""
    seq: int
    eval_fraction: float
    seed: int
    too_long: str

    def differences(self, other: DataIdentity) -> list[str]:
        """In words, what of this the other has otherwise."""
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs:
                continue
            if field.name == "tokens":
                found.append("the source file, or the tokenizer, is another")
            else:
                found.append(f"{field.name} was {mine} and is {theirs}")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """What a run has been given so far."""

    identity: DataIdentity
    epoch: int = 0
    """Of the next sequence, from 0."""
    index: int = 0
    """Of the next sequence in its epoch, from 0."""
    batches: int = 0
    """Given so far."""
    tokens: int = 0
    """Given so far, padding not counted."""
    loss_tokens: int = 0
    """Predicted so far."""

    def to_json(self) -> dict[str, object]:
        """As an object of numbers and texts."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Position:
        """What `to_json` made.

        Raises:
            UsageError: it is something else.
        """
        try:
            if not isinstance(value, Mapping):
                raise TypeError("no object")
            identity = DataIdentity(**value["identity"])
            counts = {key: count for key, count in value.items() if key != "identity"}
            position = cls(identity=identity, **counts)
            if not all(type(count) is int and count >= 0 for count in counts.values()):
                raise ValueError("a count is no number from 0")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"no position in the data ({error}): it comes from another version, or is damaged; resume from an "
                "earlier commit, or begin a new run"
            ) from error
        return position

"""What the numbers of records are called in an export."""

from __future__ import annotations

import enum

from ..profile import Profile


def block_label(profile: Profile, number: int) -> str:
    """The name of a block; "block 7" where the table lacks it, "no block" for none."""
    found = profile.blocks.get(number)
    if found is not None:
        return found.name
    return f"block {number}" if number >= 0 else "no block"


def module_label(profile: Profile, number: int) -> str:
    """The path of a module; "module 7" where the table lacks it, "no module" for none."""
    return profile.module_path(number) or (f"module {number}" if number >= 0 else "no module")


def enum_label(kind: type[enum.IntEnum], number: int) -> str:
    """The name of a member in small letters; the number itself where a newer file has members that we do not know."""
    return kind(number).name.lower() if number in kind.__members__.values() else str(number)

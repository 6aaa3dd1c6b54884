"""`penstock.PrefixStore`: keys and values of prompts, kept in a folder."""

from __future__ import annotations

import os

from .memory.prefix import PrefixStore as _PrefixStore
from .sizes import parse_size


class PrefixStore(_PrefixStore):
    """Keys and values of prompts, kept in a folder: a beginning that was computed before need not be again.

    One may write, any number may read at the same time. What is damaged, or of other weights, is not there: it costs
    computing again, and is never an error, nor another prompt's.

    Args:
        folder: Made if it is not there, with mode 0700.
        capacity: Of all its files, never exceeded: "20GiB", or a number of bytes. Kept in the folder: None leaves it as
            it is.
        readonly: Only look and read.

    Raises:
        UsageError: a new store without a capacity, a capacity that holds nothing, or one for reading only.
        StoreBusyError: somebody else writes.
        StoreError: the folder is something else, or others may enter it; or its label is damaged.
        DiskError: the folder cannot be read, or made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], capacity: int | str | None = None, *, readonly: bool = False
    ) -> None:
        super().__init__(folder, None if capacity is None else parse_size(capacity), readonly=readonly)

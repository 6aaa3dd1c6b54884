"""Every error that penstock raises on purpose.

One family, so that a caller can catch `PenstockError` and the command line can map each member to an exit code in one
place. A message says what happened, how much was asked, how much there is, and what to change.
"""


class PenstockError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(PenstockError, ValueError):
    """The caller asked for something that has no meaning: a size such as "8G", an unknown tier or device."""

    exit_code = 2


class DoesNotFitError(PenstockError):
    """The plan needs more of a tier than its budget or the machine has. Raised before anything is loaded."""

    exit_code = 3

    def __init__(
        self, message: str, *, tier: str, needed_nbytes: int, available_nbytes: int, resident_nbytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_nbytes = needed_nbytes
        """The smallest budget of this tier under which the model runs."""
        self.available_nbytes = available_nbytes
        self.resident_nbytes = resident_nbytes
        """The budget from which on nothing is streamed; None where it was not worked out."""


class CheckpointError(PenstockError):
    """A checkpoint is missing, damaged, hostile, or disagrees with its config."""


class DiskError(PenstockError):
    """A read or a write failed. The message names file, offset and remedy."""


class ScratchBusyError(PenstockError):
    """The scratch folder belongs to another process."""


class StallError(PenstockError):
    """The watchdog gave up on a wait. The message reports who waits for what."""


class ClosedError(PenstockError):
    """The model was closed, or its executor stopped, while somebody still needed it."""


class ForkError(PenstockError):
    """A streamed model was used in a forked child, where its threads and arenas do not exist."""


class ReadOnlyWeightError(PenstockError):
    """A streamed parameter was changed under a lease that was not asked for writing (the change would be lost)."""


class ProfileError(PenstockError):
    """A file is no profile, holds nothing that can be read, or is of a version newer than this penstock."""


class CalibrationError(PenstockError):
    """A kept calibration cannot be used: its file is damaged, or of another version."""


class StoreError(PenstockError):
    """A block store cannot do what was asked: there is none, it is unfinished, or it stopped after a failure."""


class StoreBusyError(StoreError):
    """The store is open for writing in another place. The message names who holds it."""


class StoreVersionError(StoreError):
    """The store was written in a format that this penstock does not read."""


class StoreIdentityError(StoreError):
    """The store holds the state of another model, or of another way to train it."""


class StoreDamagedError(StoreError):
    """A file of the store is missing, truncated, or not what was written."""


class CorruptBlockError(StoreDamagedError):
    """The bytes of a block are not those that were committed."""

    def __init__(
        self, message: str, *, block: int, path: str, offset: int, expected_checksum: int, found_checksum: int
    ) -> None:
        super().__init__(message)
        self.block = block
        self.path = path
        self.offset = offset
        """Where the block starts in the file, in bytes."""
        self.expected_checksum = expected_checksum
        self.found_checksum = found_checksum


class TraceError(PenstockError):
    """A file is no routing trace, is damaged, says what cannot be, or is of a version newer than this penstock."""

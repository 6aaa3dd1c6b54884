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

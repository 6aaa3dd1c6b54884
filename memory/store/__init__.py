"""The durable block store of training: blocks that change all the time, and a last commit that is always whole."""

from .audit import VerifyReport, verify
from .blockstore import BlockStore, BlockStoreStatistics
from .checksum import RunningChecksum, checksum
from .commit import Commit
from .files import StoreFiles, SystemFiles
from .prune import PruneReport, prune
from .reading import BadBlock
from .slotmap import BlockSpec
from .stats import StoreStats, stats

__all__ = [
    "BadBlock",
    "BlockSpec",
    "BlockStore",
    "BlockStoreStatistics",
    "Commit",
    "PruneReport",
    "RunningChecksum",
    "StoreFiles",
    "StoreStats",
    "SystemFiles",
    "VerifyReport",
    "checksum",
    "prune",
    "stats",
    "verify",
]

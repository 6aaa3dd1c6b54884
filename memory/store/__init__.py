"""The durable block store of training: blocks that change all the time, and a last commit that is always whole.

    location ► read ► check                    where the newest state of a block is, and whether it is what was written
    begin_write ► write ► written              the next state, to the slot that no manifest names
    commit ► fdatasync ► manifest ► rename     in the background; the slots of the commit before are free afterwards

Copy on write, per block: every block has two slots, and the manifest says which one is committed. Blocks that are not
written cost nothing, and a commit moves no block. What is on disk and how it is replaced stands in `folder`, the rules
of slots in `slots`, the order of a publication in `publisher`.
"""

from .audit import VerifyReport, verify
from .blockstore import BlockStore, BlockStoreStatistics
from .checksum import RunningChecksum, checksum
from .commit import Commit
from .creating import check_unused, check_vacant
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
    "check_unused",
    "check_vacant",
    "checksum",
    "prune",
    "stats",
    "verify",
]

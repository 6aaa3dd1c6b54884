"""The prefix store: keys and values of prompts on disk, found again by what they are keys and values of.

    lookup ► read ► check                        the longest beginning that is there; what is bad is not there
    put ► new file ► fsync ► rename ► fsync of the folder ► index

Nothing of it is needed: whatever is lost or damaged is computed again. So it never repairs, and never fails a reader.
What a block is called stands in `identity`, what a file holds in `segment`, who goes when it is full in `index`.
"""

from .audit import BadPart, PrefixStats, PrefixVerifyReport, stats, verify
from .folder import is_prefix_store
from .identity import KvIdentity, chain
from .index import Place
from .pruning import PrefixPruneReport, prune
from .store import PrefixHit, PrefixStore, PutReport

__all__ = [
    "BadPart",
    "KvIdentity",
    "Place",
    "PrefixHit",
    "PrefixPruneReport",
    "PrefixStats",
    "PrefixStore",
    "PrefixVerifyReport",
    "PutReport",
    "chain",
    "is_prefix_store",
    "prune",
    "stats",
    "verify",
]

"""What a run writes to its drives, and so wears of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Wear:
    """Bytes written. Manifests, a few kilobytes each, are not counted."""

    step_nbytes: int
    """By each step: masters and states, weights, and gradients, as far as they do not stay in memory."""
    commit_nbytes: int
    """By each commit after a step: masters and states that stay in memory."""

    def nbytes(self, *, done: int, steps: int, commit_every: int) -> int:
        """Of the steps that are left and their commits, the last step being one.

        Args:
            done: Steps before these.
            steps: Of the whole run.
            commit_every: Steps from one commit to the next.
        """
        commits = steps // commit_every - done // commit_every + (steps % commit_every > 0)
        return self.step_nbytes * (steps - done) + self.commit_nbytes * commits

"""What a run writes to its drives, and so wears of them."""

from __future__ import annotations

from dataclasses import dataclass

from ...scheduler.stepload import StepLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class Wear:
    """Bytes written. Manifests, a few kilobytes each, are not counted."""

    step_nbytes: int
    """By each step: masters and states, weights, and gradients, as far as they do not stay in memory."""
    commit_nbytes: int
    """By each commit after a step: masters and states that stay in memory."""
    activations_nbytes: int | None = 0
    """By each step, of activations; None before a first forward has shown what of them goes to disk, if any does."""

    def nbytes(self, *, done: int, steps: int, commit_every: int) -> int:
        """Of the steps that are left and their commits, the last step being one.

        Args:
            done: Steps before these.
            steps: Of the whole run.
            commit_every: Steps from one commit to the next.
        """
        commits = steps // commit_every - done // commit_every + (steps % commit_every > 0)
        each = self.step_nbytes + (self.activations_nbytes or 0)
        return each * (steps - done) + self.commit_nbytes * commits


def wear_of(load: StepLoad) -> Wear:
    """That of a run which is foreseen."""
    trained = load.trained()
    passes = load.accumulate - (load.updates == "backward")  # the last of a sum goes into the update
    return Wear(
        step_nbytes=sum(b.states_moved_nbytes + b.written_nbytes + passes * b.spilled_read_nbytes for b in trained),
        commit_nbytes=sum(block.states_nbytes - block.states_moved_nbytes for block in trained),
    )

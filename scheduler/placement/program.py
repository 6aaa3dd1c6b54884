"""The integer program: how many blocks of each class get each mode. Solved by HiGHS.

COSMA (arXiv 2311.18246) schedules operators the same way, one by one; FlexGen (arXiv 2303.06865) solves a linear
program over percentages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .problem import MODES, UNHIDDEN, Counts, Problem, Rings


def solve(problem: Problem, rings: Rings, *, hand_over_s: float = 0.0) -> Counts | None:
    """The counts that take least; None where none fits.

    Unknown are counts by class and mode, and the length of each phase, which is to be small.

    Args:
        hand_over_s: What going to the CPU and back is to cost each block that is computed there.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that most runs need not spend

    classes, phases, width = len(problem.classes), len(problem.weights), len(MODES)
    size = classes * width
    lengths = np.eye(phases)
    terms = [problem.terms(phase) for phase in range(phases)]
    rows: list[np.ndarray[Any, Any]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(coefficients: Sequence[Sequence[float]], least: float, most: float, phase: int | None = None) -> None:
        length = np.zeros(phases) if phase is None else -lengths[phase]
        rows.append(np.concatenate([np.ravel(coefficients), length]))
        low.append(least)
        high.append(most)

    for number, each in enumerate(problem.classes):
        constrain([[float(row == number)] * width for row in range(classes)], len(each.blocks), len(each.blocks))
    front = [[each.front_nbytes, 0, 0, 0] for each in problem.classes]
    host = [[0, each.host_nbytes, each.host_nbytes, 0] for each in problem.classes]
    constrain(front, -np.inf, problem.device_nbytes - rings.front_nbytes)
    constrain(host, -np.inf, problem.host_nbytes - rings.back_nbytes)
    for phase in range(phases):
        for coefficients in terms[phase].values():
            constrain(coefficients, -np.inf, 0, phase)
    costs = np.zeros(size)
    for phase, weight in enumerate(problem.weights):
        costs += weight * np.ravel(problem.overhead_s(phase, hand_over_s=hand_over_s))
        costs += weight * UNHIDDEN * sum(np.ravel(each) for each in terms[phase].values())
    counts = [len(each.blocks) if may else 0 for each, row in zip(problem.classes, problem.allowed(rings), strict=True)
              for may in row]  # fmt: skip
    found = milp(
        np.concatenate([costs, (1 - UNHIDDEN) * np.array(problem.weights)]),
        integrality=[1] * size + [0] * phases,
        bounds=Bounds(0, [*counts, *[np.inf] * phases]),
        constraints=LinearConstraint(np.array(rows), low, high),
        options={"mip_rel_gap": 1e-6, "time_limit": 0.5},
    )
    if found.x is None:
        return None
    whole = np.rint(found.x[:size]).astype(int).reshape(classes, width)
    return tuple(tuple(int(count) for count in row) for row in whole)

"""Carries out `penstock plan --target`: which of the known machines reach a rate, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..memory.errors import DoesNotFitError, UsageError
from ..scheduler.hardware import Hardware
from .output import Output
from .tables import lines_of
from .view import P, Paced, View

Unit = Literal["tok/s", "s/step"]
_EXAMPLES: Final[dict[Unit, str]] = {"tok/s": "5tok/s", "s/step": "20s/step"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is to be reached."""

    value: float
    unit: Unit
    tokens_per_step: int = 0
    """In training."""

    def reached(self, found: Paced) -> bool:
        """Whether a forecast reaches it."""
        if self.unit == "tok/s":
            return found.tokens_per_s >= self.value
        return self.tokens_per_step <= self.value * found.tokens_per_s


def parse_target(text: str, *, tokens_per_step: int = 0) -> Target:
    """What "5tok/s" means, or in training "20s/step".

    Args:
        text: What was written.
        tokens_per_step: 0 where nothing is trained.

    Raises:
        UsageError: it is something else.
    """
    known: list[Unit] = ["tok/s", "s/step"] if tokens_per_step else ["tok/s"]
    for unit in known:
        if text.strip().endswith(unit):
            try:
                value = float(text.strip().removesuffix(unit))
            except ValueError:
                break
            if 0 < value < 1e9:
                return Target(value=value, unit=unit, tokens_per_step=tokens_per_step)
    raise UsageError(
        f"--target {text!r} is not a rate: write for example {' or '.join(_EXAMPLES[unit] for unit in known)}"
    )


Ranking = Sequence[tuple[Hardware, P | None]]


def rank(foresee: Callable[[Hardware], P], machines: Sequence[Hardware], target: Target) -> Ranking[P]:
    """The machines that reach it, the cheapest first; then the others, the fastest first.

    As Mélange (arXiv 2404.14527) does for serving, a machine is judged by what the work gets for its price.
    """
    found: list[tuple[Hardware, P | None]] = []
    for hardware in machines:
        try:
            found.append((hardware, foresee(hardware)))
        except DoesNotFitError:
            found.append((hardware, None))

    def order(item: tuple[Hardware, P | None]) -> tuple[int, float]:
        hardware, forecast = item
        if forecast is None:
            return 2, 0.0
        if target.reached(forecast):
            return 0, hardware.price_usd if hardware.price_usd is not None else float("inf")
        return 1, -forecast.tokens_per_s

    return sorted(found, key=order)


def show_ranking(output: Output, ranking: Ranking[P], target: Target, view: View[P], *, as_json: bool) -> int:
    """Print a ranking; 3 where no machine reaches the target."""
    reached = [each for each in ranking if each[1] is not None and target.reached(each[1])]
    if as_json:
        output.write_json(
            [
                {
                    "hardware": hardware.name,
                    "price_usd": hardware.price_usd,
                    "reaches": forecast is not None and target.reached(forecast),
                    **({} if forecast is None else view.document(forecast)),
                }
                for hardware, forecast in ranking
            ]
        )
    else:
        rows = [["machine", "price", *view.columns[: view.short], view.columns[-1], ""]]
        for hardware, forecast in ranking:
            price = "-" if hardware.price_usd is None else f"${hardware.price_usd:,.0f}"
            if forecast is None:
                rows.append([hardware.name, price, *["-"] * (view.short + 1), "does not fit"])
                continue
            cells = list(view.row(forecast))
            verdict = "yes" if target.reached(forecast) else "too slow"
            rows.append([hardware.name, price, *cells[: view.short], cells[-1], verdict])
        for line in lines_of(rows):
            output.data.print(line)
    return 0 if reached else 3

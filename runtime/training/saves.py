"""What a forward leaves for backward: records."""

from __future__ import annotations

from dataclasses import dataclass

from ..explain import gib


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCount:
    """One call of one layer."""

    path: str
    saved_nbytes: int
    """Of what it makes: not what it was given, nor what a layer before has saved already."""
    peak_nbytes: int
    """That its forward has made and not given back, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A product with weights, in a forward."""

    weight_nbytes: int
    rows: float
    """That use them."""
    inputs: int
    """Numbers that each number of the result is a sum of."""
    nbytes: int
    """Of the result."""
    dtype: str
    again: bool
    """Whether a layer that runs again does it again, if its result is not held: none does its last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSaves:
    """What a forward leaves for backward."""

    layers: tuple[LayerCount, ...] = ()
    """Calls of what could run again, in order."""
    layers_nbytes: int
    """That layers save: counted, or estimated."""
    every_nbytes: int
    """With what layers are given and what is saved outside of them."""
    products: tuple[Product, ...] = ()
    """In order; none where they were not counted."""
    why_estimated: str = ""
    """Why nothing was counted; "" where it was."""

    @property
    def counted(self) -> bool:
        """Whether it is, rather than estimated."""
        return not self.why_estimated

    @property
    def largest_nbytes(self) -> int:
        """That one layer saves, at most."""
        return max((layer.saved_nbytes for layer in self.layers), default=0)

    @property
    def peak_nbytes(self) -> int:
        """Of the layer whose forward takes most while it runs."""
        return max((layer.peak_nbytes for layer in self.layers), default=0)

    def movable_nbytes(self, activations: str) -> int:
        """Of it, what may be elsewhere: a plan leaves alone what is not made by layers, "offload" moves all of it."""
        return self.every_nbytes if activations == "offload" else self.layers_nbytes

    def told(self) -> str:
        """A sentence for plans."""
        if not self.counted:
            return (
                f"a forward saves about {gib(self.layers_nbytes)} in its layers, an estimate from their widths: it "
                f"cannot be counted, for {self.why_estimated}"
            )
        if not self.layers:
            return f"a forward saves {gib(self.every_nbytes)} (counted), none of it in layers that could run again"
        beside = gib(self.every_nbytes - self.layers_nbytes)
        return (
            f"a forward saves {gib(self.layers_nbytes)} in {len(self.layers)} layers and {beside} beside them "
            f"(counted); a layer takes {gib(self.peak_nbytes)} at most while it runs"
        )

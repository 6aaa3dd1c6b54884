"""Cutting a module into blocks.

A block belongs to the module that anchors it: it is leased while that module's `forward` runs. Any subtree may be a
block, so the cut is by size: the largest subtrees that stay below a limit. Parameters of modules that are never called
(`ModuleList`, `ParameterList`) belong to the nearest module above that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import nn

ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase)
"""Modules that use their children's parameters without calling the children, in code that must not be looked into."""

MAX_TOGETHER = 4
"""Large parameters that one module owns directly and leases together. More (a ParameterList) are leased as they are
used, so that they need not all fit at once."""


@dataclass(kw_only=True, eq=False)
class Group:
    """The parameters of one block-to-be."""

    anchor: str
    """Qualified name of the module whose forward leases it."""
    names: list[str] = field(default_factory=list)
    nbytes: int = 0


@dataclass(kw_only=True, eq=False)
class Partition:
    """A cut of a module."""

    groups: list[Group]
    """In definition order."""
    small: Group
    """Tensors not worth a block of their own, resident together."""
    uses: dict[str, list[str]]
    """What each anchoring module's forward needs, shared parameters included; in definition order."""


def callable_module(module: nn.Module) -> bool:
    """Whether the module has a forward of its own."""
    return type(module).forward is not nn.Module.forward


class _Cutter:
    def __init__(
        self, sizes: Mapping[str, int], names: Mapping[int, str], limit: int, tables: set[str], apart: Set[str]
    ) -> None:
        self.sizes, self.names, self.limit, self.tables, self.apart = sizes, names, limit, tables, apart
        self.taken: set[str] = set()
        self.groups: list[Group] = []
        self.uses: dict[str, list[str]] = {}

    def own(self, module: nn.Module) -> Iterator[str]:
        for parameter in module._parameters.values():
            name = None if parameter is None else self.names.get(id(parameter))
            if name is not None:
                yield name

    def subtree(self, module: nn.Module) -> list[str]:
        found = dict.fromkeys(name for child in module.modules() for name in self.own(child))
        return list(found)

    def mixed(self, module: nn.Module, path: str) -> bool:
        """Whether a subtree holds parameters of both kinds: of modules that are to lie apart, and of others."""
        if not self.apart:
            return False
        owners = (
            f"{path}.{below}" if path and below else path or below
            for below, child in module.named_modules()
            if any(True for _ in self.own(child))
        )
        return len({owner in self.apart for owner in owners}) > 1

    def take(self, anchor: str | None, names: list[str]) -> None:
        if anchor is not None:
            self.uses.setdefault(anchor, []).extend(names)
        names = [name for name in names if name not in self.taken]
        self.taken.update(names)
        names = [name for name in names if name not in self.tables]
        if names:
            nbytes = sum(self.sizes[name] for name in names)
            self.groups.append(Group(anchor=anchor or "", names=names, nbytes=nbytes))

    def visit(self, module: nn.Module, path: str, anchor: str) -> None:
        if callable_module(module):
            anchor = path
            subtree = self.subtree(module)
            total = sum(self.sizes[name] for name in subtree if name not in self.tables and name not in self.taken)
            if (total <= self.limit and not self.mixed(module, path)) or isinstance(module, ATOMIC):
                self.take(anchor, subtree)
                return
        own = list(self.own(module))
        together = len(own) <= MAX_TOGETHER or sum(self.sizes[name] for name in own) <= self.limit
        for name in own:
            self.take(anchor if together else None, [name])
        for child_name, child in module.named_children():
            self.visit(child, f"{path}.{child_name}" if path else child_name, anchor)


def streamable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that can be streamed, each once, by its first qualified name.

    Tensor subclasses (quantised weights of other libraries) stay where they are.
    """
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    }


def table_candidates(module: nn.Module) -> set[str]:
    """Names of parameters that may be served by rows: embedding tables, and linear layers that stand alone.

    A linear layer in a list of layers is one of many like it; its size is what a slot has anyway.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = set()
    for path, child in module.named_modules():
        alone = not any(part.isdigit() for part in path.split("."))
        if (isinstance(child, nn.Embedding) and child.max_norm is None) or (isinstance(child, nn.Linear) and alone):
            name = names.get(id(child.weight))
            if name is not None:
                found.add(name)
    return found


def embedding_only(module: nn.Module) -> set[str]:
    """Names of embedding weights that no linear layer shares."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding) and m.max_norm is None}
    other = {
        id(parameter)
        for m in module.modules()
        if not isinstance(m, nn.Embedding)
        for parameter in m._parameters.values()
        if parameter is not None
    }
    return {names[key] for key in looked_up - other if key in names}


def cut(
    module: nn.Module, sizes: Mapping[str, int], *, limit: int, tables: set[str], apart: Set[str] = frozenset()
) -> Partition:
    """Cut `module` into blocks of at most `limit` bytes where its structure allows it.

    Args:
        module: The root.
        sizes: Bytes of each parameter to be streamed, by first qualified name.
        limit: Bytes per block.
        tables: Parameters that are served by rows instead.
        apart: Paths of modules that share no block with other modules: they are used at other times.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters() if name in sizes}
    cutter = _Cutter(sizes, names, limit, tables, apart)
    cutter.visit(module, "", "")
    total = sum(sizes.values())
    small = Group(anchor="")
    groups = []
    for group in cutter.groups:
        tiny = group.nbytes <= limit // 64 and group.nbytes <= 2**20
        if tiny and small.nbytes + group.nbytes <= total // 32:
            small.names += group.names
            small.nbytes += group.nbytes
        else:
            groups.append(group)
    return Partition(groups=groups, small=small, uses=cutter.uses)


def limits(module: nn.Module, sizes: Mapping[str, int], *, count: int = 8) -> list[int]:
    """Block sizes worth trying: sizes of subtrees that occur, thinned out, smallest first."""
    names = {id(parameter): name for name, parameter in module.named_parameters() if name in sizes}
    total = sum(sizes.values())
    found = set()
    for child in module.modules():
        if callable_module(child):
            held = {names[id(p)] for p in child.parameters() if id(p) in names}
            size = sum(sizes[name] for name in held)
            if 0 < size <= max(total // 3, min(sizes.values(), default=0)):
                found.add(size)
    found |= {size for size in sizes.values() if size <= total // 3}
    ordered = sorted(size for size in found if size >= total // 512) or [max(sizes.values(), default=1)]
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]

"""Cutting modules into blocks: by size, by structure, each parameter once."""

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.runtime.partition import Partition, cut, embedding_only, limits, streamable, table_candidates


def sizes(module: nn.Module) -> dict[str, int]:
    return {name: parameter.nbytes for name, parameter in streamable(module).items()}


def parts(
    module: nn.Module, limit: int, tables: set[str] | None = None, apart: frozenset[str] = frozenset()
) -> Partition:
    """Cut, and check what holds of every cut: each parameter in one place, and every use of it known."""
    every = sizes(module)
    made = cut(module, every, limit=limit, tables=tables or set(), apart=apart)
    placed = [name for group in [*made.groups, made.small] for name in group.names]
    assert sorted(placed) == sorted(set(every) - (tables or set()))
    for group in [*made.groups, made.small]:
        assert group.nbytes == sum(every[name] for name in group.names)
    return made


def anchors(made: Partition) -> list[tuple[str, list[str]]]:
    return [(group.anchor, group.names) for group in made.groups]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Stack(nn.Module):
    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_the_largest_subtrees_below_the_limit() -> None:
    layer = 2 * 16 * 16 * 4
    made = parts(Stack(), layer)
    assert [anchor for anchor, _ in anchors(made)][1:4] == ["layers.0", "layers.1", "layers.2"]
    assert made.uses["layers.1"] == ["layers.1.up.weight", "layers.1.down.weight"]
    made = parts(Stack(), layer - 1)
    assert [anchor for anchor, _ in anchors(made)][1:5] == [
        "layers.0.up",
        "layers.0.down",
        "layers.1.up",
        "layers.1.down",
    ]
    assert anchors(parts(Stack(), 1 << 20)) == [("", list(sizes(Stack())))]


def test_tables_are_no_blocks_but_their_uses_are_known() -> None:
    tables = {"embed.weight", "head.weight"}
    made = parts(Stack(), 2048, tables)
    assert [anchor for anchor, _ in anchors(made)] == ["layers.0", "layers.1", "layers.2"]
    assert made.uses["head"] == ["head.weight"]


def test_a_parameter_used_twice_is_in_one_block_and_in_both_uses() -> None:
    module = Stack(depth=2)
    module.layers[1].up.weight = module.layers[0].down.weight
    module.head.weight = module.embed.weight
    made = parts(module, 2048)
    assert made.uses["layers.1"] == ["layers.0.down.weight", "layers.1.down.weight"]
    assert made.uses["head"] == ["embed.weight"]
    assert dict(anchors(made))["layers.1"] == ["layers.1.down.weight"]


def test_a_module_used_twice_is_cut_once() -> None:
    module = Stack(depth=1)
    module.layers.append(module.layers[0])
    made = parts(module, 2048)
    assert sum("layers.0.up.weight" in group.names for group in made.groups) == 1


class Listed(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(300))
        self.held = nn.ParameterList(torch.zeros(300) for _ in range(count))
        self.named = nn.ParameterDict({"x": torch.zeros(300)})

    def forward(self) -> torch.Tensor:
        return self.own + self.held[0] + self.named["x"]


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(400))
        self.inner = Listed()

    def forward(self) -> torch.Tensor:
        return self.inner()


def test_lists_of_parameters_belong_to_the_module_that_is_called() -> None:
    made = parts(Around(), 1300)
    assert ("", ["scale"]) in anchors(made)
    assert set(made.uses["inner"]) == {"inner.own", "inner.held.0", "inner.held.1", "inner.named.x"}
    assert "inner.held" not in made.uses
    assert dict(anchors(parts(Around(), 5000)))["inner"] == list(made.uses["inner"])


def test_attention_is_never_cut() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4)
            self.rnn = nn.LSTM(32, 32)
            self.after = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.attention(x, x, x)[0])

    made = parts(Attending(), 100)
    whole = dict(anchors(made))
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= set(whole["attention"])
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0"} <= set(whole["rnn"])


def test_tiny_tensors_stay_together_and_stay_few() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(20))
            self.wide = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    made = parts(Normed(), 128 * 128 * 4)
    assert [anchor for anchor, _ in anchors(made)] == [f"wide.{i}" for i in range(4)]
    assert len(made.small.names) == 40
    assert made.small.nbytes <= sum(sizes(Normed()).values()) // 32


def test_candidates_for_tables() -> None:
    module = Stack(depth=1)
    assert table_candidates(module) == {"embed.weight", "head.weight"}  # not those of the layers
    assert embedding_only(module) == {"embed.weight"}
    module.head.weight = module.embed.weight
    assert table_candidates(module) == {"embed.weight"}
    assert embedding_only(module) == set()
    clipped = nn.Sequential()
    clipped.add_module("words", nn.Embedding(5, 2, max_norm=1.0))
    assert table_candidates(clipped) == set()  # its lookup writes to the table
    assert embedding_only(clipped) == set()


def test_only_plain_parameters_are_streamed() -> None:
    class Odd(torch.Tensor):
        pass

    module = nn.Module()
    module.plain = nn.Parameter(torch.zeros(2))
    module.odd = nn.Parameter(torch.zeros(2).as_subclass(Odd))
    module.same = module.plain
    assert list(streamable(module)) == ["plain"]


def small_modules() -> Iterator[nn.Module]:
    yield Stack()
    yield Around()
    yield nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(8, 2), Block(8))
    tied = Stack(depth=2)
    tied.head.weight = tied.embed.weight
    yield tied


@given(module=st.sampled_from(list(small_modules())), limit=st.integers(1, 10_000))
def test_every_cut_holds_every_parameter_once(module: nn.Module, limit: int) -> None:
    parts(module, limit)


@given(module=st.sampled_from(list(small_modules())), count=st.integers(2, 10))
def test_limits_are_ascending_and_few(module: nn.Module, count: int) -> None:
    found = limits(module, sizes(module), count=count)
    assert found == sorted(found)
    assert 1 <= len(found) <= count
    assert all(value > 0 for value in found)


def test_modules_used_at_other_times_share_no_block_with_the_rest() -> None:
    module = nn.Sequential(Block(64), Block(64), Block(64))
    whole = 2 * 64 * 64 * 4
    names = ["up.weight", "down.weight"]
    assert anchors(parts(module, whole)) == [(str(i), [f"{i}.{n}" for n in names]) for i in range(3)]
    assert anchors(parts(module, whole, apart=frozenset({"1.down"}))) == [
        ("0", ["0.up.weight", "0.down.weight"]),
        ("1.up", ["1.up.weight"]),
        ("1.down", ["1.down.weight"]),
        ("2", ["2.up.weight", "2.down.weight"]),
    ]
    all_of_one = frozenset({"1", "1.up", "1.down"})
    assert anchors(parts(module, whole, apart=all_of_one)) == anchors(parts(module, whole))

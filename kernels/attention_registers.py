"""Attention of a few queries to blocks in half precision on a CPU, widened in the registers they are multiplied from.

Of a head and a run of blocks, tile by tile:

    s = scale · q Kᵀ,    m' = max(m, max s),    p = exp(s − m'),    w = exp(m − m')
    l' = w·l + Σ p,      O' = w·O + p V

and in the end O / l and m + log l (FlashAttention's online softmax, arXiv 2205.14135). Keys and values are read once,
in the order in which they lie; all else is fp32. This is the function as it is given to LLVM, for one dtype, size of
heads and number of queries each, so that what is summed up stays in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llvmlite import ir

from .registers import F32, I32, I64, LANES, PAIR, WIDE, Registers, i32, i64, wide

TILE: Final = 64
"""Tokens. Their keys and values are prefetched while others are multiplied, and have to fit the first cache."""
GROUP: Final = 4
"""Queries that are multiplied at once: of sixteen registers half are sums, and what is widened has to be used often."""
SUMS: Final = 8
"""Registers in which products are summed up: as many as there are products under way."""
UNROLLED: Final = 4
"""Tokens whose values are added without a jump between them."""

FIELDS: Final = (
    "next", "items", "heads", "blocks", "per_part", "tokens", "scale",
    "query", "query_block", "query_head", "query_row",
    "keys", "keys_block", "keys_head", "keys_token",
    "values", "values_block", "values_head", "values_token",
    "out", "lse",
)  # fmt: skip
"""Of a job, 64 bits each: counts, the bits of the scale, addresses, strides in bytes.

`next` is counted up by each thread that takes an item. An item is a head of a part, a part so many blocks that follow
each other, with the queries of the first of them. Results are [parts, heads, rows, value dim] and [parts, heads, rows],
without gaps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a function is made for. Sizes of heads are multiples of 16."""

    fp16: bool
    """Else bf16."""
    dim: int
    """Of queries and keys."""
    value_dim: int
    rows: int
    """Queries of a head."""


def attention(kind: Kind) -> Any:
    """A module with the function `attend(job)`, which takes items of a job until there are none."""
    module = ir.Module("attention")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "attend")
    _Attention(kind, function).emit()
    return module


class _Attention:
    """One function.

    Args:
        kind: What it is made for.
        function: Without blocks yet.
    """

    def __init__(self, kind: Kind, function: Any) -> None:
        self._kind = kind
        self._log = ir.Function(function.module, ir.FunctionType(F32, [F32]), "llvm.log.f32")
        self._function = function
        self._r = Registers(function)
        b = self._r.b
        self._job = {name: b.load(b.gep(function.args[0], [i64(at)])) for at, name in enumerate(FIELDS) if at}
        rows = kind.rows
        self._query = self._r.room(rows * kind.dim)
        self._scores = self._r.room(rows * TILE)
        self._out = self._r.room(rows * kind.value_dim)
        self._largest, self._weight, self._shrink = (self._r.room(rows * LANES) for _ in range(3))
        """A register for each row: m in all of its places, l in eight parts, w."""

    def emit(self) -> None:
        """Emit all of it."""
        b = self._r.b
        take, work, done = (b.append_basic_block(name) for name in ("take", "work", "done"))
        b.branch(take)
        b.position_at_end(take)
        item = b.atomic_rmw("add", self._function.args[0], i64(1), "monotonic")
        b.cbranch(b.icmp_signed("<", item, self._job["items"]), work, done)
        b.position_at_end(work)
        self._item(item)
        b.branch(take)
        b.position_at_end(done)
        b.ret_void()

    def _item(self, item: Any) -> None:
        r, b, job = self._r, self._r.b, self._job
        part, head = b.sdiv(item, job["heads"]), b.srem(item, job["heads"])
        first = b.mul(part, job["per_part"])
        stop = r.less(b.add(first, job["per_part"]), job["blocks"])
        self._begin(r.along(job["query"], (first, job["query_block"]), (head, job["query_head"])))
        of_head = [r.along(job[name], (head, job[f"{name}_head"])) for name in ("keys", "values")]

        def of_block(block: Any) -> Sequence[Any]:
            keys = r.along(of_head[0], (block, job["keys_block"]))
            values = r.along(of_head[1], (block, job["values_block"]))
            is_last = b.icmp_signed(">=", b.add(block, i64(1)), stop)
            next_block = b.select(is_last, keys, b.add(keys, job["keys_block"]))

            def of_tile(start: Any) -> Sequence[Any]:
                after = b.add(start, i64(TILE))
                is_within = b.icmp_signed("<", after, job["tokens"])
                self._tile(
                    r.along(keys, (start, job["keys_token"])),
                    r.along(values, (start, job["values_token"])),
                    b.select(is_within, r.along(keys, (after, job["keys_token"])), next_block),
                    r.less(b.sub(job["tokens"], start), i64(TILE)),
                )
                return ()

            r.loop(i64(0), job["tokens"], TILE, of_tile)
            return ()

        r.loop(first, stop, 1, of_block)
        self._end(item)

    def _begin(self, query: Any) -> None:
        """Queries in fp32, scaled, in the order that keys have when they are widened; and nothing seen."""
        r, b, dim = self._r, self._r.b, self._kind.dim
        scale = r.splat(b.bitcast(b.trunc(self._job["scale"], I32), F32))

        def of_row(row: Any) -> Sequence[Any]:
            address = r.along(query, (row, self._job["query_row"]))
            for pair in range(dim // PAIR):
                for half, register in enumerate(r.widened(address, pair, fp16=self._kind.fp16)):
                    place = r.place(self._query, b.mul(row, i64(dim)), pair * PAIR + half * LANES)
                    b.store(b.fmul(register, scale), place)
            b.store(wide(-math.inf), r.place(self._largest, b.mul(row, i64(LANES))))
            b.store(wide(0.0), r.place(self._weight, b.mul(row, i64(LANES))))
            return ()

        def of_out(at: Any) -> Sequence[Any]:
            b.store(wide(0.0), r.place(self._out, at))
            return ()

        r.loop(i64(0), i64(self._kind.rows), 1, of_row)
        r.loop(i64(0), i64(self._kind.rows * self._kind.value_dim), LANES, of_out)

    def _tile(self, keys: Any, values: Any, next_keys: Any, count: Any) -> None:
        """Up to 64 tokens; `next_keys` are those that come after them, or any that are there."""
        r, b = self._r, self._r.b
        last = b.and_(b.sub(count, i64(1)), i64(-LANES))
        for row in range(self._kind.rows):  # what is beyond the last token, in the last register of scores
            b.store(wide(-math.inf), r.place(self._scores, last, row * TILE))
        for group in _groups(self._kind.rows):
            self._score(keys, values, count, group)
        r.loop(i64(0), i64(self._kind.rows), 1, lambda row: self._exponentials(row, count))
        for group in _groups(self._kind.rows):
            self._collect(values, next_keys, count, group)

    def _score(self, keys: Any, values: Any, count: Any, group: _Group) -> None:
        """Scores of some rows; the values of the same tokens are prefetched."""
        r, b = self._r, self._r.b
        at_once = max(2, SUMS // group.rows)
        at_once -= at_once % 2

        def some(tokens: int) -> Any:
            def body(token: Any) -> Sequence[Any]:
                if not group.first:
                    self._prefetch("values", values, token, tokens)
                lines = [r.along(keys, (b.add(token, i64(n)), self._job["keys_token"])) for n in range(tokens)]
                r.loop(*group.range, lambda row: self._scores_of(lines, token, row, group.rows))
                return ()

            return body

        whole = b.and_(count, i64(-at_once))
        r.loop(i64(0), whole, at_once, some(at_once))
        r.loop(whole, count, 1, some(1))

    def _scores_of(self, lines: Sequence[Any], token: Any, row: Any, rows: int) -> Sequence[Any]:
        r, b, dim = self._r, self._r.b, self._kind.dim
        sums = [[wide(0.0)] * len(lines) for _ in range(rows)]
        for pair in range(dim // PAIR):
            keys = [r.widened(line, pair, fp16=self._kind.fp16) for line in lines]
            for half in range(2):
                for n in range(rows):
                    place = r.place(self._query, b.mul(row, i64(dim)), n * dim + pair * PAIR + half * LANES)
                    query = b.load(place)
                    sums[n] = [r.madd(key[half], query, known) for key, known in zip(keys, sums[n], strict=True)]
        scores = r.sums([register for line in sums for register in line])
        for n in range(rows):
            some = r.shuffled(scores, scores, range(n * len(lines), (n + 1) * len(lines)))
            where = b.add(b.mul(row, i64(TILE)), token)
            if len(lines) == 1:
                b.store(b.extract_element(some, i32(0)), r.place(self._scores, where, n * TILE, count=1))
            else:
                b.store(some, r.place(self._scores, where, n * TILE, count=len(lines)), align=4)
        return ()

    def _exponentials(self, row: Any, count: Any) -> Sequence[Any]:
        """A row's scores become exponentials; what was seen before shrinks where something larger came."""
        r, b = self._r, self._r.b
        scores, where = b.mul(row, i64(TILE)), b.mul(row, i64(LANES))
        before = b.load(r.place(self._largest, where))

        def largest_of(at: Any, known: Any) -> Sequence[Any]:
            return (r.larger(b.load(r.place(self._scores, b.add(scores, at))), known),)

        (largest,) = r.loop(i64(0), count, LANES, largest_of, before)
        largest = r.folded(largest, r.larger)
        # −∞ less −∞ is not 0: nothing that counts was seen then.
        base = b.select(b.fcmp_ordered("==", largest, wide(-math.inf)), wide(0.0), largest)
        shrink = r.exp(b.fsub(before, base))

        def exponential_of(at: Any, known: Any) -> Sequence[Any]:
            place = r.place(self._scores, b.add(scores, at))
            share = r.exp(b.fsub(b.load(place), base))
            b.store(share, place)
            return (b.fadd(known, share),)

        weight = b.fmul(b.load(r.place(self._weight, where)), shrink)
        (weight,) = r.loop(i64(0), count, LANES, exponential_of, weight)
        for register, room in ((largest, self._largest), (weight, self._weight), (shrink, self._shrink)):
            b.store(register, r.place(room, where))
        return ()

    def _collect(self, values: Any, next_keys: Any, count: Any, group: _Group) -> None:
        """Values by their exponentials, for some rows; the next tile's keys are prefetched."""
        r, pairs = self._r, self._kind.value_dim // PAIR
        at_once = max(1, SUMS // (2 * group.rows))

        def of_group(row: Any) -> Sequence[Any]:
            for first in range(0, pairs, at_once):
                ahead = next_keys if not group.first and not first else None
                self._collect_some(values, ahead, count, row, group.rows, range(first, min(first + at_once, pairs)))
            return ()

        r.loop(*group.range, of_group)

    def _collect_some(self, values: Any, ahead: Any, count: Any, row: Any, rows: int, pairs: range) -> None:
        """Of some pairs of registers of the result."""
        r, b, dim = self._r, self._r.b, self._kind.value_dim
        places, sums = [], []
        for n in range(rows):
            shrink = b.load(r.place(self._shrink, b.mul(row, i64(LANES)), n * LANES))
            for at in range(pairs.start * PAIR, pairs.stop * PAIR, LANES):
                places.append(r.place(self._out, b.mul(row, i64(dim)), n * dim + at))
                sums.append(b.fmul(b.load(places[-1]), shrink))

        def some(tokens: int) -> Any:
            def body(token: Any, *sums: Any) -> Sequence[Any]:
                if ahead is not None:
                    self._prefetch("keys", ahead, token, tokens)
                for n in range(tokens):
                    sums = tuple(self._added(values, b.add(token, i64(n)), row, rows, pairs, sums))
                return sums

            return body

        whole = b.and_(count, i64(-UNROLLED))
        sums = r.loop(i64(0), whole, UNROLLED, some(UNROLLED), *sums)
        sums = r.loop(whole, count, 1, some(1), *sums)
        for register, place in zip(sums, places, strict=True):
            b.store(register, place)

    def _added(self, values: Any, token: Any, row: Any, rows: int, pairs: range, sums: Sequence[Any]) -> list[Any]:
        """One token's values."""
        r, b = self._r, self._r.b
        line = r.along(values, (token, self._job["values_token"]))
        halves = [half for pair in pairs for half in r.widened(line, pair, fp16=self._kind.fp16)]
        left: list[Any] = []
        for n in range(rows):
            where = b.add(b.mul(row, i64(TILE)), token)
            share = r.splat(b.load(r.place(self._scores, where, n * TILE, count=1)))
            left += [r.madd(share, half, known) for half, known in zip(halves, sums[len(left) :], strict=False)]
        return left

    def _end(self, item: Any) -> None:
        """The results of an item."""
        r, b, kind, job = self._r, self._r.b, self._kind, self._job

        def of_row(row: Any) -> Sequence[Any]:
            where = b.mul(row, i64(LANES))
            weight = r.folded(b.load(r.place(self._weight, where)), b.fadd)
            number = r.along(row, (item, i64(kind.rows)))
            line = r.along(job["out"], (number, i64(4 * kind.value_dim)))
            for at in range(0, kind.value_dim, PAIR):
                places = [r.place(self._out, b.mul(row, i64(kind.value_dim)), at + half) for half in (0, LANES)]
                halves = r.in_order(*(b.fdiv(b.load(place), weight) for place in places), fp16=kind.fp16)
                for half, register in enumerate(halves):
                    b.store(register, r.at(line, WIDE, 4 * (at + half * LANES)), align=4)
            largest = b.extract_element(b.load(r.place(self._largest, where)), i32(0))
            lse = b.fadd(largest, b.call(self._log, [b.extract_element(weight, i32(0))]))
            # Where no score is a number above −∞ there is no softmax.
            is_nothing = b.fcmp_ordered("==", largest, ir.Constant(F32, -math.inf))
            lse = b.select(is_nothing, ir.Constant(F32, math.nan), lse)
            b.store(lse, r.at(r.along(job["lse"], (number, i64(4))), F32), align=4)
            return ()

        r.loop(i64(0), i64(kind.rows), 1, of_row)

    def _prefetch(self, name: str, address: Any, token: Any, tokens: int) -> None:
        dim = self._kind.dim if name == "keys" else self._kind.value_dim
        for n in range(tokens):
            token_after = self._r.b.add(token, i64(n))
            self._r.prefetch(self._r.along(address, (token_after, self._job[f"{name}_token"])), 2 * dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Rows that are multiplied together, and as many after them."""

    first: int
    rows: int
    count: int

    @property
    def range(self) -> tuple[Any, Any, int]:
        """For a loop over their first rows."""
        return i64(self.first), i64(self.first + self.count * self.rows), self.rows


def _groups(rows: int) -> list[_Group]:
    """As many groups of four as there are, and what is left."""
    whole, rest = divmod(rows, GROUP)
    groups = (_Group(first=0, rows=GROUP, count=whole), _Group(first=whole * GROUP, rows=rest, count=1))
    return [group for group in groups if group.rows and group.count]

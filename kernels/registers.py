"""What compiled functions do with registers of eight numbers in fp32, as instructions for LLVM.

Every x86 processor of the last ten years has sixteen of them; for others LLVM makes two or more of each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from llvmlite import ir

LANES: Final = 8
"""Numbers in a register."""
PAIR: Final = 2 * LANES
"""Elements that are widened at once, into two registers."""

F32: Final = ir.FloatType()
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
WIDE: Final = ir.VectorType(F32, LANES)
_WORDS: Final = ir.VectorType(I32, LANES)
_HALVES: Final = ir.VectorType(ir.HalfType(), LANES)
_BYTES: Final = ir.IntType(8).as_pointer()

_EXPONENTIAL: Final = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    0.5,
    1.0,
    1.0,
)
"""Of a polynomial that is exp between −log 2 / 2 and log 2 / 2 (Cephes' expf), the highest power first."""
_LOG2_HIGH: Final = 0.693359375
_LOG2_LOW: Final = -2.12194440e-4
"""Together log 2; the first part times a whole number is exact."""
_LEAST: Final = -87.3
"""exp of it is about the least normal number."""
_TREE: Final = (
    ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)
"""How the sums of eight registers come to be one: of two of them these places, plus those. None crosses halves but the
last."""


def i64(number: int) -> Any:
    """A constant."""
    return ir.Constant(I64, number)


def i32(number: int) -> Any:
    """A constant."""
    return ir.Constant(I32, number)


def wide(number: float) -> Any:
    """A register full of it, rounded to fp32: LLVM takes no other numbers."""
    return ir.Constant(WIDE, [struct.unpack("f", struct.pack("f", number))[0]] * LANES)


class Registers:
    """Emits instructions at the end of a function that is being made.

    No licence is given but that a product and a sum may be one instruction: what is NaN or infinite stays so.

    Args:
        function: Without blocks yet.
    """

    def __init__(self, function: Any) -> None:
        module = function.module
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self._fmuladd = ir.Function(module, ir.FunctionType(WIDE, [WIDE] * 3), f"llvm.fmuladd.v{LANES}f32")
        kinds = [_BYTES, I32, I32, I32]
        self._prefetch = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0")

    def loop(self, start: Any, stop: Any, step: int, body: Callable[..., Sequence[Any]], *carried: Any) -> list[Any]:
        """Emit `for i in range(start, stop, step)`.

        Args:
            start: An i64, as `stop`.
            stop: See `start`.
            step: Of i.
            body: Emits what is done with i and with the values that a round leaves to the next; gives those.
            carried: What they are before the first round.

        Returns:
            What they are after the last one.
        """
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i, *values = phis = [b.phi(value.type) for value in (start, *carried)]
        for phi, value in zip(phis, (start, *carried), strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", i, stop), inside, after)
        b.position_at_end(inside)
        left = body(i, *values)
        for phi, value in zip(phis, (b.add(i, i64(step)), *left), strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def room(self, elements: int) -> Any:
        """So many numbers in fp32 on the stack."""
        room = self.b.alloca(F32, i64(elements))
        room.align = 4 * LANES
        return room

    def place(self, room: Any, at: Any, more: int = 0, *, count: int = LANES) -> Any:
        """Where `count` numbers lie, from a number of a room on."""
        place = self.b.gep(room, [self.b.add(at, i64(more))])
        return place if count == 1 else self.b.bitcast(place, ir.VectorType(F32, count).as_pointer())

    def at(self, address: Any, kind: Any, more: int = 0) -> Any:
        """Where something of a type lies in the program's memory, so many bytes after an address."""
        return self.b.inttoptr(self.b.add(address, i64(more)), kind.as_pointer())

    def along(self, start: Any, *terms: tuple[Any, Any]) -> Any:
        """start + Σ count · stride."""
        for count, stride in terms:
            start = self.b.add(start, self.b.mul(count, stride))
        return start

    def less(self, one: Any, other: Any) -> Any:
        """The smaller one of two i64."""
        return self.b.select(self.b.icmp_signed("<", one, other), one, other)

    def madd(self, one: Any, other: Any, added: Any) -> Any:
        """one · other + added."""
        return self.b.call(self._fmuladd, [one, other, added])

    def larger(self, new: Any, known: Any) -> Any:
        """The larger one of each; the known one where the new one is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", new, known), new, known)

    def splat(self, number: Any) -> Any:
        """A register full of a number."""
        one = self.b.insert_element(ir.Constant(WIDE, ir.Undefined), number, i32(0))
        return self.shuffled(one, one, [0] * LANES)

    def shuffled(self, one: Any, other: Any, places: Iterable[int]) -> Any:
        """Numbers at these places, counted through two registers."""
        mask = list(places)
        return self.b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(mask)), mask))

    def folded(self, register: Any, join: Callable[[Any, Any], Any]) -> Any:
        """All numbers of a register joined, in each of its places."""
        for distance in (4, 2, 1):
            other = self.shuffled(register, register, (i ^ distance for i in range(LANES)))
            register = join(register, other)
        return register

    def sums(self, registers: Sequence[Any]) -> Any:
        """The sums of up to eight registers, as one."""
        left = [*registers, *[wide(0.0)] * (LANES - len(registers))]
        for these, those in _TREE:
            left = [
                self.b.fadd(self.shuffled(one, other, these), self.shuffled(one, other, those))
                for one, other in zip(left[::2], left[1::2], strict=True)
            ]
        return left[0]

    def widened(self, address: Any, pair: int, *, fp16: bool) -> tuple[Any, Any]:
        """Sixteen halves in two registers: as they lie if fp16, else the even ones and the odd ones.

        Args:
            address: Of the first of them all, in bytes.
            pair: Which sixteen.
            fp16: Else bf16, which is the upper half of fp32: two of them are a word of 32 bits, and need no more than a
                shift or a mask.
        """
        b, more = self.b, 2 * PAIR * pair
        if fp16:
            first, second = (b.load(self.at(address, _HALVES, more + at), align=2) for at in (0, PAIR))
            return b.fpext(first, WIDE), b.fpext(second, WIDE)
        words = b.load(self.at(address, _WORDS, more), align=2)
        even = b.shl(words, ir.Constant(_WORDS, [16] * LANES))
        odd = b.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
        return b.bitcast(even, WIDE), b.bitcast(odd, WIDE)

    def in_order(self, first: Any, second: Any, *, fp16: bool) -> tuple[Any, Any]:
        """Two registers as they came from `widened`, in the order of what was widened."""
        if fp16:
            return first, second
        both = [i // 2 + i % 2 * LANES for i in range(PAIR)]
        return self.shuffled(first, second, both[:LANES]), self.shuffled(first, second, both[LANES:])

    def exp(self, x: Any) -> Any:
        """Of numbers up to 0, to 2 units of the last place; 0 where that would not be a normal number, NaN of NaN."""
        b = self.b
        magic = wide(1.5 * 2**23)  # added to it, a number becomes whole, and that its last bits
        shifted = self.madd(x, wide(math.log2(math.e)), magic)
        whole = b.fsub(shifted, magic)
        rest = self.madd(whole, wide(-_LOG2_LOW), self.madd(whole, wide(-_LOG2_HIGH), x))
        polynomial = wide(_EXPONENTIAL[0])
        for coefficient in _EXPONENTIAL[1:]:
            polynomial = self.madd(polynomial, rest, wide(coefficient))
        exponent = b.shl(b.bitcast(shifted, _WORDS), ir.Constant(_WORDS, [23] * LANES))
        power = b.bitcast(b.add(exponent, ir.Constant(_WORDS, [127 << 23] * LANES)), WIDE)
        return b.select(b.fcmp_ordered("<", x, wide(_LEAST)), wide(0.0), b.fmul(polynomial, power))

    def prefetch(self, address: Any, nbytes: int) -> None:
        """Have the lines of some bytes fetched into the first cache."""
        for more in range(0, nbytes, 64):
            place = self.b.inttoptr(self.b.add(address, i64(more)), _BYTES)
            self.b.call(self._prefetch, [place, i32(0), i32(3), i32(1)])

"""Access orders: what is learned, what is predicted across calls, and how a run finds back after a surprise."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.order import MAX_VARIANTS, AccessOrders

GUESS = (0, 1, 2, 3)


def orders(first: str | None = "a") -> AccessOrders:
    return AccessOrders(lambda root: GUESS, first=first)


def call(made: AccessOrders, root: str, blocks: Sequence[int]) -> bool:
    made.begin(root)
    for block in blocks:
        made.observe(block)
    return made.end()


def ahead(made: AccessOrders, count: int) -> list[int]:
    return list(made.upcoming(count))


def test_before_the_first_call_the_guess_is_expected_again_and_again() -> None:
    assert ahead(orders(), 6) == [0, 1, 2, 3, 0, 1]
    assert ahead(orders(first=None), 6) == []
    assert ahead(AccessOrders(lambda root: (), first="a"), 6) == []


def test_predicted_accesses_move_on() -> None:
    made = orders()
    made.begin("a")
    assert [made.observe(block) for block in (0, 1)] == [True, True]
    assert ahead(made, 5) == [2, 3, 0, 1, 2]
    assert [made.observe(block) for block in (2, 3)] == [True, True]
    assert ahead(made, 2) == [0, 1]
    assert made.end() is False  # nothing new
    statistics = made.statistics()
    assert (statistics.calls, statistics.matched, statistics.mismatched, statistics.relearned) == (1, 4, 0, 0)


def test_another_order_is_learned_after_one_call() -> None:
    made = orders()
    assert call(made, "a", [3, 1, 0]) is True
    assert ahead(made, 6) == [3, 1, 0, 3, 1, 0]
    assert call(made, "a", [3, 1, 0]) is False
    assert made.statistics().relearned == 1


def test_a_skipped_block_does_not_lose_the_place() -> None:
    made = orders()
    made.begin("a")
    assert made.observe(0)
    assert not made.observe(2)  # 1 was skipped
    assert ahead(made, 3) == [3, 0, 1]
    assert made.observe(3)


def test_an_unknown_block_does_not_lose_the_place() -> None:
    made = orders()
    made.begin("a")
    assert made.observe(0)
    assert not made.observe(9)
    assert ahead(made, 3) == [1, 2, 3]
    assert made.observe(1)


def test_a_known_variant_is_recognised_at_the_first_difference() -> None:
    made = orders()
    call(made, "a", [0, 1, 2, 3])
    call(made, "a", [0, 5, 6, 7])
    call(made, "a", [0, 1, 2, 3])
    made.begin("a")
    made.observe(0)
    other = 5 if ahead(made, 1) == [1] else 1
    assert not made.observe(other)
    assert ahead(made, 2) == ([6, 7] if other == 5 else [2, 3])


def test_encoder_once_then_decoder_again_and_again() -> None:
    made = AccessOrders(lambda root: {"encoder": (0, 1), "decoder": (2, 3)}[str(root)], first="encoder")

    def generation() -> None:
        call(made, "encoder", [0, 1])
        call(made, "decoder", [2, 4, 3])  # the first one projects the cross-attention keys
        for _ in range(3):
            call(made, "decoder", [2, 3])

    generation()
    assert ahead(made, 4) == [2, 3, 2, 3]
    generation()
    before = made.statistics()
    call(made, "encoder", [0, 1])
    assert ahead(made, 5) == [2, 4, 3, 2, 3]  # the first decoder call is foreseen as it is
    call(made, "decoder", [2, 4, 3])
    assert ahead(made, 2) == [2, 3]
    after = made.statistics()
    assert after.matched - before.matched == 5
    assert after.relearned == before.relearned
    for _ in range(2):
        call(made, "decoder", [2, 3])
    assert ahead(made, 4) == [2, 3, 2, 3]


def test_draft_and_target_alternate() -> None:
    made = AccessOrders(lambda root: (), first=None)
    for _ in range(2):
        call(made, "draft", [0, 1])
        call(made, "target", [5, 6, 7])
    assert ahead(made, 7) == [0, 1, 5, 6, 7, 0, 1]
    mismatched = made.statistics().mismatched
    for _ in range(3):
        call(made, "draft", [0, 1])
        call(made, "target", [5, 6, 7])
    assert made.statistics().mismatched == mismatched


def test_a_call_that_raised_teaches_nothing() -> None:
    made = orders()
    call(made, "a", [0, 1, 2, 3])
    before = ahead(made, 8)
    made.begin("a")
    made.observe(3)
    made.observe(0)
    made.abort()
    assert ahead(made, 8) == before
    assert made.statistics().calls == 1
    assert call(made, "a", [0, 1, 2, 3]) is False


def test_an_unannounced_root_takes_its_own_last_order() -> None:
    made = orders()
    call(made, "b", [7, 8])
    call(made, "a", [0, 1, 2, 3])
    made.begin("a")
    made.end()
    made.begin("b")
    assert ahead(made, 2) == [7, 8]


def test_memory_is_bounded_under_random_control_flow() -> None:
    made = orders()
    for number in range(100):
        call(made, "a", [number, number + 1])
    assert len(made._variants["a"]) == MAX_VARIANTS
    assert len(made._follows) <= MAX_VARIANTS + 1


@given(calls=st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 6), max_size=8)), max_size=12))
def test_any_calls(calls: list[tuple[str, list[int]]]) -> None:
    made = orders()
    for root, blocks in calls:
        call(made, root, blocks)
        assert len(ahead(made, 20)) in (0, *range(1, 21))
    statistics = made.statistics()
    assert statistics.calls == len(calls)
    assert statistics.matched + statistics.mismatched == sum(len(blocks) for _, blocks in calls)


@given(
    period=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 6), min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
        unique_by=lambda one: (one[0], tuple(one[1])),
    )
)
def test_any_period_of_distinct_calls_is_predicted_after_two_rounds(period: list[tuple[str, list[int]]]) -> None:
    made = orders()
    for _ in range(2):
        for root, blocks in period:
            call(made, root, blocks)
    whole = [block for _, blocks in period for block in blocks]
    assert ahead(made, 3 * len(whole)) == whole * 3
    before = made.statistics().mismatched
    for root, blocks in period:
        call(made, root, blocks)
    assert made.statistics().mismatched == before


def test_what_repeats() -> None:
    orders = AccessOrders(lambda root: ())

    def call(root: str, *blocks: int) -> tuple[int, ...] | None:
        orders.begin(root)
        for block in blocks:
            orders.observe(block)
        orders.end()
        return orders.steady()

    assert call("encoder", 0, 1) is None
    assert call("decoder", 2, 3) is None
    assert call("decoder", 2) is None
    assert call("decoder", 2) == (2,)
    assert call("encoder", 0, 1) == (2, 3, 2, 0, 1), "answer after answer"
    assert call("decoder", 2, 3) == (2, 0, 1, 2, 3)
    assert call("decoder", 2) == (0, 1, 2, 3, 2)
    assert call("decoder", 2) == (2,), "and token after token"
    assert call("a", 5) is None
    assert call("b", 6) is None
    assert call("a", 5) == (6, 5), "two parts in turn"
    assert call("b", 6) == (5, 6)


def backward(made: AccessOrders, blocks: Sequence[int]) -> None:
    for block in blocks:
        assert made.begin_backward()
        made.observe(block)


def test_a_backward_pass_is_expected_from_behind_and_then_as_it_was() -> None:
    made = orders()
    call(made, "a", [0, 1, 2, 3])
    assert ahead(made, 3) == [0, 1, 2]  # whoever only runs forward has the next one at once
    backward(made, [3])
    assert ahead(made, 3) == [2, 1, 0]  # never seen: what was used last comes first
    backward(made, [2, 1, 1])
    call_after_backward(made, [0, 1, 2, 3])
    assert ahead(made, 6) == [3, 2, 1, 1, 0, 1]
    backward(made, [3, 2])
    assert ahead(made, 4) == [1, 1, 0, 1]


def call_after_backward(made: AccessOrders, blocks: Sequence[int]) -> None:
    assert made.in_backward
    made.end()
    assert not made.in_backward
    call(made, "a", blocks)


def test_layers_that_run_again_in_backward_have_one_behind_each() -> None:
    made = orders()
    for _ in range(3):
        call(made, "model", [0, 1, 2, 3])
        for layer in (1, 0):
            call(made, f"layer {layer}", [2 * layer, 2 * layer + 1])
            backward(made, [2 * layer + 1, 2 * layer])
            made.end()
    assert ahead(made, 14) == [0, 1, 2, 3, 2, 3, 3, 2, 0, 1, 1, 0, 0, 1]


def test_within_a_call_nothing_is_learned_of_a_backward_pass_and_before_any_there_is_none() -> None:
    made = orders()
    assert not made.begin_backward()
    made.begin("a")
    assert not made.begin_backward()
    made.end()
    assert made.begin_backward()
    made.abort()
    assert made.begin_backward()

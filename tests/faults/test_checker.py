"""The checker of the fault tests: it passes what is right and catches each way of being wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults.checker import Call, Mark, Reading, Seen, check, duplicates


def mark(number: int, key: str = "feedback/a") -> Mark:
    return Mark(key, f"{key}-{number}", "digest")


def call(*numbers: int, acknowledged: bool = True) -> Call:
    return Call("p", 0.0, 1.0, 1, [mark(number) for number in numbers], acknowledged)


def reading(*numbers: int, reader: str = "r", folded: bool = True) -> Reading:
    return Reading(reader, [Seen("s", offset, mark(number)) for offset, number in enumerate(numbers, 1)], folded)


CALLS = [call(1, 2), call(3), call(4, 5, acknowledged=False)]


def kinds(*readings: Reading) -> set[str]:
    return {violation.kind for violation in check(CALLS, readings)}


@pytest.mark.parametrize("numbers", [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5)])
def test_all_that_was_acknowledged_and_a_first_part_of_the_rest_is_right(numbers: tuple[int, ...]) -> None:
    assert check(CALLS, [reading(*numbers), reading(*numbers, reader="other")]) == []


def test_keys_may_come_in_any_order_to_each_other() -> None:
    one, other = mark(1, "feedback/a"), mark(1, "feedback/b")
    calls = [Call("p", 0.0, 1.0, 1, [one, other])]
    assert check(calls, [Reading("r", [Seen("s", 1, other), Seen("s", 2, one)])]) == []


def test_a_duplicate_in_the_log_is_none_after_folding_and_is_counted() -> None:
    raw = reading(1, 2, 1, 2, 3, folded=False)
    assert check(CALLS, [raw]) == []
    assert duplicates(raw) == 2


def test_a_lost_event_is_caught() -> None:
    assert "lost" in kinds(reading(1, 2))
    assert "lost" in kinds(reading(1, 3))
    assert "lost" in kinds(reading())


def test_a_doubled_event_is_caught() -> None:
    assert kinds(reading(1, 2, 2, 3)) == {"doubled"}


def test_another_event_under_an_id_that_is_taken_is_caught() -> None:
    changed = Seen("s", 4, Mark("feedback/a", mark(3).id, "other"))
    assert kinds(Reading("r", [*reading(1, 2, 3).seen, changed])) >= {"doubled", "invented"}


@pytest.mark.parametrize("numbers", [(2, 1, 3), (1, 3, 2), (1, 2, 3, 5)])
def test_a_reordered_event_and_a_gap_are_caught(numbers: tuple[int, ...]) -> None:
    assert kinds(reading(*numbers)) == {"reordered"}
    assert kinds(reading(*numbers, folded=False)) == {"reordered"}


def test_an_event_that_nobody_sent_is_caught() -> None:
    assert "invented" in kinds(reading(1, 2, 3, 4, 5, 6))
    elsewhere = Seen("s", 9, mark(1, "updates/a"))
    assert "invented" in kinds(Reading("r", [*reading(1, 2, 3).seen, elsewhere]))


def test_readers_that_saw_different_things_are_caught() -> None:
    assert kinds(reading(1, 2, 3, reader="one"), reading(1, 2, 3, 4, reader="other")) == {"differs"}


def test_a_place_that_changed_between_two_readers_is_caught() -> None:
    moved = [Seen(each.stream, each.offset + 1, each.mark) for each in reading(1, 2, 3).seen]
    assert kinds(reading(1, 2, 3), Reading("other", moved)) == {"differs"}


@pytest.mark.parametrize("change", [lambda seen: [*seen, seen[0]], lambda seen: [seen[1], seen[0], *seen[2:]]])
def test_a_stream_that_runs_backwards_is_caught(change: Callable[[list[Seen]], list[Seen]]) -> None:
    assert "reordered" in kinds(Reading("r", change(list(reading(1, 2, 3).seen)), folded=False))

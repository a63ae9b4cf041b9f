"""What the clients' own numbers show of a log in which something is missing."""

from __future__ import annotations

from fedloop_events.verify.sequences import At, Sequences


def never(what: str, at: At) -> None:
    raise AssertionError(what)


def test_what_retention_has_removed_is_not_called_missing() -> None:
    wrong: list[str] = []
    sequences = Sequences(lambda what, at: wrong.append(f"{at.offset}: {what}"), never)
    sequences.begins_late(1000)
    for offset, (seq, appended_ms) in enumerate([(3, 900), (6, 1100), (8, 1200)], 1):
        sequences.take("one", seq, appended_ms, At("feedback-3", offset), "feedback-3")
    sequences.end()
    assert wrong == ["3: 1 events of one before this one are missing"]


def test_numbers_that_come_from_several_streams_need_not_come_in_order() -> None:
    wrong: list[str] = []
    misconduct: list[str] = []
    sequences = Sequences(lambda what, at: wrong.append(what), lambda what, at: misconduct.append(what))
    for stream, seq in (("clients-0", 0), ("clients-0", 3), ("audit-0", 2), ("updates-5", 1), ("audit-0", 4)):
        sequences.take("one", seq, 1, At(stream, seq + 1), stream)
    sequences.end()
    assert wrong == misconduct == []
    sequences.take("one", 3, 1, At("audit-0", 9), "audit-0")
    assert (wrong, misconduct) == ([], ["one used its sequence number 3 for a second event"])


def test_a_leap_that_no_removal_explains_is_the_clients() -> None:
    wrong: list[str] = []
    misconduct: list[str] = []
    sequences = Sequences(lambda what, at: wrong.append(what), lambda what, at: misconduct.append(what))
    for client, gap in (("one", 100_000), ("two", 200_000)):
        sequences.take(client, 0, 1, At("log", 1), client)
        sequences.take(client, gap + 1, 5, At("log", 2), client)
    sequences.end()
    assert wrong == ["100000 events of one before this one are missing"]
    assert misconduct == ["two left out 200,000 sequence numbers before this event"]

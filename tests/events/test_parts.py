"""Decisions in several events: they say what one would, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import samples
from fedloop_events import envelope, parts, types
from fedloop_events.envelope import MAX_EVENT_BYTES, Event, Record
from fedloop_events.folds.admit import Admit, Standing
from fedloop_events.parts import split
from fedloop_events.types import BlobRef
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

BLOB = BlobRef("a" * 64, 10)
NAMES = [f"device-{number:04d}-{'x' * 60}" for number in range(1000)]
"""A cohort of them needs several events."""


def opened(names: Sequence[str], out: Sequence[str] = (), epoch: int = 1) -> types.RoundOpened:
    return types.RoundOpened(
        samples.ORIGIN, epoch, "main", "r0001", "q", 1, "default", "0000-x", BLOB, "ffa", list(names), 1, 600.0, ["x"], 10_000,
        10.0, excluded=[types.Exclusion(name, "not-drawn") for name in out],
    )  # fmt: skip


def closed(names: Sequence[str], out: Sequence[str] = ()) -> types.RoundClosed:
    accepted = [types.AcceptedUpdate(name, "0" * 32, "1" * 32, BLOB) for name in names]
    return types.RoundClosed(
        samples.ORIGIN, 1, "main", 9, accepted, [types.Exclusion(name, "silent") for name in out], round_id="r0001"
    )


def records(*said: types.Payload) -> list[Record]:
    return [samples.record(samples.event(each), offset) for offset, each in enumerate(said, 1)]


def admitted(records: Sequence[Record], admit: Admit | None = None) -> list[types.Payload]:
    admit = admit or Admit()
    return [payload for record in records if (payload := admit(record)) is not None]


def test_what_fits_into_one_event_is_one_event() -> None:
    for payload in (opened(NAMES[:128], NAMES[128:300]), closed(NAMES[:64]), samples.epoch(), samples.feedback()):
        assert split(payload) == [payload]


@pytest.mark.parametrize("payload", [opened(NAMES, NAMES), closed(NAMES, NAMES), closed([], NAMES), opened(NAMES[:2], NAMES)])
def test_a_thousand_names_are_several_events_that_say_the_same(payload: types.Payload) -> None:
    events = split(payload)
    assert len(events) > 1
    assert all(len(samples.event(each).data) < MAX_EVENT_BYTES for each in events)
    assert admitted(records(samples.epoch(), *events))[1:] == [payload]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 400))
def test_whatever_the_sizes_what_is_joined_is_what_was_split(members: int, out: int, part_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", part_bytes)
        for payload in (opened(NAMES[:members], NAMES[:out]), closed(NAMES[:members], NAMES[:out])):
            assert admitted(records(samples.epoch(), *split(payload)))[1:] == [payload]


@pytest.mark.parametrize("payload", [opened(NAMES, NAMES), closed(NAMES)])
def test_a_decision_that_lacks_a_part_counts_for_nothing_until_it_is_made_again(payload: types.Payload) -> None:
    events = split(payload)
    for lost in range(len(events)):
        rest = [each for number, each in enumerate(events) if number != lost]
        assert admitted(records(samples.epoch(), *rest)) == [samples.epoch()]
        assert admitted(records(samples.epoch(), *rest, *events))[1:] == [payload]


def test_a_part_with_other_content_than_its_hash_names_is_none_of_it() -> None:
    first, *rest = split(opened(NAMES, NAMES))
    assert isinstance(first, types.CohortListed)
    forged = replace(first, cohort=[*first.cohort[:-1], "intruder"])
    assert admitted(records(samples.epoch(), forged, *rest)) == [samples.epoch()]


def test_the_parts_of_a_fenced_server_are_of_no_use_to_the_next() -> None:
    *listed, whole = split(opened(NAMES, NAMES))
    later = replace(whole, epoch=2)
    assert admitted(records(samples.epoch(1), *listed, samples.epoch(2), later)) == [samples.epoch(1), samples.epoch(2)]
    assert admitted(records(samples.epoch(2), *listed, later)) == [samples.epoch(2)]


def test_who_sees_some_parts_alone_learns_what_they_say() -> None:
    """As a device does through a gateway: it is in the cohort if one that names it is among those that the opening names."""
    *listed, whole = split(opened(NAMES, NAMES))
    mine = [each for each in listed if NAMES[700] in each.named]
    assert len(mine) == 1
    (_, joined) = admitted(records(samples.epoch(), *mine, whole), Admit(partly=True))
    assert isinstance(joined, types.RoundOpened)
    assert NAMES[700] in joined.cohort
    assert len(joined.cohort) < len(NAMES)
    foreign = split(replace(opened(NAMES[500:]), round_id="r0002", excluded=[types.Exclusion(name, "x") for name in NAMES]))
    (_, other) = admitted(records(samples.epoch(), *foreign[:-1], whole), Admit(partly=True))
    assert isinstance(other, types.RoundOpened)
    assert other.cohort == []


def test_parts_are_seen_by_whom_they_list_and_nobody_reads_who_was_not_chosen() -> None:
    for payload in (opened(NAMES[:600], NAMES[600:]), closed(NAMES[:600], NAMES[600:])):
        *listed, whole = split(payload)
        assert list(whole.named) == []
        named = [name for each in listed for name in each.named]
        assert named == (NAMES[:600] if isinstance(payload, types.RoundOpened) else NAMES)


def test_a_snapshot_between_the_parts_forgets_none() -> None:
    said = records(samples.epoch(), *split(opened(NAMES, NAMES)))
    for cut in range(len(said)):
        admit = Admit()
        found = admitted(said[:cut], admit)
        admit.standing = msgspec.msgpack.decode(msgspec.msgpack.encode(admit.standing), type=Standing)
        assert [*found, *admitted(said[cut:], admit)] == [samples.epoch(), opened(NAMES, NAMES)]
        assert admit.standing.parts == parts.Parts()


def test_parts_that_nobody_names_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PENDING", 3)
    admit = Admit()
    admitted(
        records(samples.epoch(), *(types.CohortListed(samples.ORIGIN, 1, "main", f"r{n}", [f"c{n}"]) for n in range(9))), admit
    )
    assert [each.cohort for each in admit.standing.parts.cohorts.values()] == [["c6"], ["c7"], ["c8"]]


# --- older versions ---


def old_closed(round_id: str | None) -> Event:
    old = types.RoundClosedV1(
        samples.ORIGIN,
        1,
        "main",
        3,
        [types.AcceptedUpdate("ann", "0" * 32, "1" * 32)],
        [types.Exclusion("bob", "silent")],
        round_id,
    )
    event = samples.event(closed([]))
    return msgspec.structs.replace(event, type="io.fedloop.round.closed.v1", data=msgspec.json.encode(old))


def test_what_closed_a_round_still_does_and_a_step_of_another_run_is_one() -> None:
    ended, step = envelope.decode(old_closed("r0001")), envelope.decode(old_closed(None))
    assert type(ended) is types.RoundClosed
    assert type(step) is types.StepCollected
    for each in (ended, step):
        assert [update.client_id for update in each.accepted] == ["ann"]
        assert (each.step, [out.client_id for out in each.excluded]) == (3, ["bob"])

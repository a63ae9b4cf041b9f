"""What counts: one place authenticates and fences, for every reader, and a snapshot does not forget what it knew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import samples
from fedloop_events import topics, types
from fedloop_events.errors import InvalidEventError, SignatureError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import BlobRef

BLOB = BlobRef("0" * 64, 1)


def nodes(epoch: int, run_id: str = "main", step: int = 0) -> types.NodesListed:
    return types.NodesListed(samples.ORIGIN, epoch, run_id, step, ["11"])


def proposed(epoch: int, model: str = "default", number: int = 0) -> types.ReleaseProposed:
    return types.ReleaseProposed(samples.ORIGIN, model, epoch, f"{model}-{number}", number, BLOB)


def counting(*said: types.Payload) -> list[types.Payload]:
    """What counts of what is said, in this order, by whom it names."""
    admit = Admit()
    found = [admit(samples.record(samples.event(each), offset)) for offset, each in enumerate(said, 1)]
    return [each for each in found if each is not None]


def test_a_decision_counts_if_its_epoch_is_the_latest_of_its_run() -> None:
    said = [
        nodes(0),
        nodes(1),
        samples.epoch(1),
        nodes(1),
        samples.epoch(3),
        nodes(1),
        nodes(4),
        nodes(3),
        samples.epoch(2),
        nodes(2),
    ]
    assert counting(*said) == [said[2], said[3], said[4], said[7]]
    other = msgspec.structs.replace(samples.epoch(9), run_id="other")
    assert counting(samples.epoch(1), other, nodes(1), nodes(9), nodes(9, "other"))[2:] == [nodes(1), nodes(9, "other")]


def test_of_two_servers_that_begin_one_epoch_the_first_has_it() -> None:
    mine, yours = samples.epoch(1), msgspec.structs.replace(samples.epoch(1), server_id="yours")
    assert counting(mine, yours) == [mine]


def test_releases_are_fenced_by_what_their_model_has_seen_whatever_rounds_say() -> None:
    """Between the topics a log has no order: an epoch may begin for one reader after what it decides about releases."""
    said = [
        samples.epoch(5),
        proposed(2),
        proposed(2, number=1),
        proposed(1, number=2),
        proposed(1, "other"),
        proposed(3, number=3),
    ]
    assert counting(*said) == [said[0], said[1], said[2], said[4], said[5]]


def test_what_operators_and_devices_say_has_no_epoch() -> None:
    said = [
        samples.epoch(5),
        proposed(5),
        types.RoundRequested(samples.ORIGIN, "main", "q"),
        types.ReleaseRolledBack(samples.ORIGIN, "default", "a", "b", "worse"),
        samples.revoked(),
        samples.feedback(),
    ]
    assert counting(*said) == said


def test_stale_decisions_are_counted_by_run() -> None:
    admit = Admit()
    said: Sequence[types.Payload] = [samples.epoch(2), nodes(1), nodes(2), nodes(1, step=1), nodes(1, "other"), samples.epoch(1)]
    for offset, each in enumerate(said, 1):
        admit(samples.record(samples.event(each), offset))
    assert admit.standing.stale == {"main": 2, "other": 1}


def test_an_event_that_its_author_did_not_sign_changes_no_epoch() -> None:
    admit = Admit(Identities())
    admit(samples.record(samples.signed(samples.created()), 1))
    with pytest.raises(SignatureError):
        admit(samples.record(samples.signed(samples.epoch(9), by="device-1"), 2))
    started = samples.epoch(1)
    assert admit(samples.record(samples.signed(started), 3)) == started


@pytest.mark.parametrize("again", [False, True], ids=["at first", "again"])
def test_nothing_unsigned_comes_in_by_the_topic_of_enrolments(again: bool) -> None:
    """That topic everybody may append to who enrols."""
    identities = Identities()
    admit = Admit(identities)
    admit(samples.record(samples.signed(samples.created()), 1))
    for offset, payload in enumerate((samples.epoch(9), nodes(1), samples.revoked(), samples.seen()), 2):
        record = samples.record(msgspec.structs.replace(samples.event(payload), topic=topics.CLIENTS), offset)
        if again:
            with pytest.raises(InvalidEventError):
                identities.apply(record, payload)
        with pytest.raises(InvalidEventError):
            admit(record)
    assert admit.standing.epochs == {}


def test_identities_are_taken_in_once_and_a_refused_enrolment_stays_refused() -> None:
    identities = Identities()
    admit = Admit(identities)
    records = [samples.record(samples.signed(each), at) for at, each in enumerate((samples.created(), samples.enrolled()), 1)]
    second = samples.record(samples.signed(samples.enrolled(by="thief"), by="thief"), 3)
    for _ in range(2):
        assert [type(admit(record)) for record in records] == [types.DeploymentCreated, types.ClientEnrolled]
        with pytest.raises(InvalidEventError):
            admit(second)
    assert list(identities.clients) == ["device-1"]


def test_a_reader_that_goes_on_from_a_snapshot_knows_who_is_fenced(tmp_path: Path) -> None:
    log, kept = SqliteLog(tmp_path / "log.sqlite"), Snapshots(tmp_path / "rounds.snapshot")
    log.append([samples.signed(each, by="server") for each in (samples.created(), samples.epoch(2), nodes(1))])
    first = Reader(log, RoundsView(), identities=Identities(), snapshots=kept)
    first.catch_up()
    first.save()
    aborted = types.RoundAborted(samples.ORIGIN, 1, "main", "r0001", "operator")
    log.append([samples.signed(types.RoundRequested(samples.ORIGIN, "main", "q")), samples.signed(aborted)])
    second = Reader(log, RoundsView(), identities=Identities(), snapshots=kept)
    assert second.catch_up() == 2
    assert (second.fold.epoch, second.fold.rounds, second.standing.stale) == (2, {}, {"main": 2})
    log.close()

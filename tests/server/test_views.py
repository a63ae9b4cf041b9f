"""The views of rounds and releases: folds that nothing derails, that count decisions once, and that are quick."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import pytest
import samples
from fedloop_events import envelope, types
from fedloop_events.envelope import Record
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import MAX_REPLIES_EACH, RoundsView
from fedloop_events.ids import derived_id
from fedloop_events.types import BlobRef
from hypothesis import given
from hypothesis import strategies as st

ORIGIN = "o"
BLOB = BlobRef("0" * 64, 10)
OTHER = BlobRef("1" * 64, 10)
Said = tuple[str, types.Payload]
"""An event's id, and what it says."""


def records(said: Sequence[Said]) -> list[Record]:
    return [
        samples.record(envelope.encode(each, id=event_id, time_s=0), at + 1, appended_ms=10 * at)
        for at, (event_id, each) in enumerate(said)
    ]


def numbered(said: Sequence[types.Payload]) -> list[Said]:
    return [(derived_id(at), payload) for at, payload in enumerate(said)]


def admitted(said: Sequence[Said], admit: Admit) -> list[tuple[Record, types.Payload]]:
    return [(record, payload) for record in records(said) if (payload := admit(record)) is not None]


def rounds_of(*said: types.Payload) -> RoundsView:
    view = RoundsView()
    for record, payload in admitted(numbered(said), Admit()):
        view.apply(record, payload)
    return view


def releases_of(*said: types.Payload) -> ReleasesView:
    view = ReleasesView()
    for record, payload in admitted(numbered(said), Admit()):
        view.apply(record, payload)
    return view


def epoch(number: int, server_id: str = "s") -> types.EpochStarted:
    return types.EpochStarted(ORIGIN, number, "main", server_id)


def requested(request_id: str = "q1", rounds: int = 1, run_id: str = "main") -> types.RoundRequested:
    return types.RoundRequested(ORIGIN, run_id, request_id, rounds)


def to_abort(number: int, run_id: str = "main") -> types.RoundAbortRequested:
    return types.RoundAbortRequested(ORIGIN, run_id, f"r{number}", "wrong terms")


def withdrawn(request_id: str = "q1", run_id: str = "main") -> types.RoundRequestWithdrawn:
    return types.RoundRequestWithdrawn(ORIGIN, run_id, request_id, "enough")


def opened(number: int, *, at_epoch: int = 1, request_id: str = "q1", run_id: str = "main") -> types.RoundOpened:
    return types.RoundOpened(
        ORIGIN, at_epoch, run_id, f"r{number}", request_id, number, "default", "x", BLOB, "ffa", ["ann", "bob"], 1, 1.0,
        [], 1, 1.0, excluded=[types.Exclusion("cem", "revoked")],
    )  # fmt: skip


def closed(number: int, *accepted: str, at_epoch: int = 1) -> types.RoundClosed:
    updates = [types.AcceptedUpdate("ann", each, "0" * 32, BLOB) for each in accepted]
    return types.RoundClosed(ORIGIN, at_epoch, "main", 9, updates, [types.Exclusion("bob", "silent")], f"r{number}")


def aborted(number: int, *, at_epoch: int = 1) -> types.RoundAborted:
    return types.RoundAborted(ORIGIN, at_epoch, "main", f"r{number}", "quorum", "", [types.Exclusion("ann", "unavailable")])


def sent(number: int, client_id: str, at_epoch: int = 1) -> types.InstructionSent:
    content = types.Content(arrays={"arrays": BLOB})
    return types.InstructionSent(ORIGIN, at_epoch, "main", 0, client_id, "train", content, "0" * 64, f"r{number}")


def update(number: int, client_id: str = "ann", seq: int = 0) -> types.UpdateSubmitted:
    return types.UpdateSubmitted(ORIGIN, client_id, seq, "main", "0" * 32, types.Content(), f"r{number}")


def refused(number: int, update_id: str, at_epoch: int = 1) -> types.UpdateRefused:
    return types.UpdateRefused(ORIGIN, at_epoch, "main", "ann", update_id, "late", "", f"r{number}")


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_a_round_goes_from_requested_over_open_to_closed() -> None:
    view = rounds_of(epoch(1), requested(rounds=2))
    assert view.pending is not None
    view = rounds_of(epoch(1), requested(rounds=2), opened(1), sent(1, "ann"), sent(1, "bob"))
    state = view.rounds["r1"]
    assert (state.state, state.participants, state.bytes_down, state.opened_ms) == ("open", [], 20, 20)
    assert view.open_round is state
    view = rounds_of(epoch(1), requested(rounds=2), opened(1), sent(1, "ann"), update(1), closed(1, derived_id(4)))
    state = view.rounds["r1"]
    assert (state.state, state.participants, state.bytes_up, state.ended_ms) == ("closed", ["ann"], 10, 50)
    assert {name: each.reason for name, each in state.excluded.items()} == {"bob": "silent", "cem": "revoked"}
    assert (view.open_round, view.next_number, view.unanswered) == (None, 2, {})
    assert view.pending is not None
    assert view.pending.numbers == [1]


def test_requests_are_served_in_order_and_one_that_is_given_up_is_over() -> None:
    asked = (epoch(1), requested("q1", 5), requested("q2", 1))
    view = rounds_of(*asked, opened(1), closed(1), aborted(2), opened(3, request_id="q2"))
    assert [(each.request_id, each.numbers, each.given_up) for each in view.requests.values()] == [
        ("q1", [1, 2], True),
        ("q2", [3], False),
    ]
    assert view.pending is None
    assert view.rounds["r2"].opened is None
    assert view.rounds["r2"].excluded["ann"].reason == "unavailable"
    assert "r2" not in rounds_of(*asked[:1], aborted(2)).rounds


def test_what_a_fenced_server_says_counts_for_nothing() -> None:
    said = (epoch(1), requested(rounds=9), opened(1), epoch(2), closed(1, "f" * 32), aborted(1), opened(2), epoch(1))
    view, admit = rounds_of(*said), Admit()
    admitted(numbered(said), admit)
    assert (view.epoch, admit.standing.stale, list(view.rounds)) == (2, {"main": 3}, ["r1"])
    assert view.rounds["r1"].state == "open"
    assert rounds_of(epoch(1), requested(), opened(1), closed(1, at_epoch=2)).rounds["r1"].state == "open"
    assert rounds_of(epoch(2, "mine"), epoch(2, "yours")).server_id == "mine"


def test_a_decision_counts_once() -> None:
    view = rounds_of(epoch(1), requested(rounds=9), opened(1), closed(1, "a" * 32), closed(1, "b" * 32), opened(1), opened(3))
    assert [each.update_id for each in view.rounds["r1"].closed.accepted] == ["a" * 32]  # type: ignore[union-attr]
    assert (list(view.rounds), view.requests["q1"].numbers) == (["r1"], [1])
    assert rounds_of(epoch(1), opened(1)).rounds == {}  # nobody asked for it
    assert rounds_of(epoch(1), requested(), requested(rounds=7)).requests["q1"].rounds == 1


def test_a_round_of_several_steps_ends_with_the_one_that_closes_it() -> None:
    step = types.StepCollected(
        ORIGIN,
        1,
        "main",
        5,
        [types.AcceptedUpdate("bob", derived_id(4), "0" * 32, BLOB)],
        [types.Exclusion("dan", "silent")],
        "r1",
    )
    said = [epoch(1), requested(), opened(1), sent(1, "bob"), update(1, "bob"), step, sent(1, "ann"), update(1)]
    state = rounds_of(*said).rounds["r1"]
    assert (state.state, state.participants, state.bytes_up, state.excluded["dan"].reason) == ("open", [], 10, "silent")
    view = rounds_of(*said, update(1, "bob", seq=1), closed(1, derived_id(7)), step)
    state = view.rounds["r1"]
    assert (state.state, state.participants, state.bytes_up) == ("closed", ["ann"], 20)
    assert view.unanswered == {derived_id(8): ("r1", "bob")}, "what an earlier step accepted has its answer"
    assert [each.step for each in state.collected] == [5, 9]
    assert RoundsView.from_state(view.to_state()) == view


def test_an_aborted_round_has_no_participants_even_if_some_were_accepted() -> None:
    view = rounds_of(epoch(1), requested(), opened(1), update(1), closed(1, derived_id(3)), aborted(1))
    assert (view.rounds["r1"].state, view.rounds["r1"].participants) == ("aborted", [])


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_an_update_that_did_not_count_is_unanswered_until_it_is_refused(*, late: bool) -> None:
    order = [closed(1), update(1)] if late else [update(1), closed(1)]
    said = [epoch(1), requested(), opened(1), *order]
    update_id = derived_id(4 if late else 3)
    assert rounds_of(*said).unanswered == {update_id: ("r1", "ann")}
    view = rounds_of(*said, refused(1, update_id))
    assert view.unanswered == {}
    assert view.rounds["r1"].refused[update_id].reason == "late"
    assert rounds_of(*said, refused(1, update_id, at_epoch=7)).unanswered != {}


def test_updates_of_no_known_round_and_floods_change_nothing() -> None:
    flood = [update(1, seq=number) for number in range(50)]
    view = rounds_of(epoch(1), update(1), requested(), opened(1), update(8), *flood)
    assert len(view.rounds["r1"].replies["ann"]) == MAX_REPLIES_EACH
    assert list(view.rounds) == ["r1"]


def test_another_run_is_another_view() -> None:
    view = rounds_of(types.EpochStarted(ORIGIN, 1, "other", "s"), requested(run_id="other"), opened(1, run_id="other"))
    assert view == RoundsView()


def test_a_withdrawn_request_opens_no_further_round_and_the_next_one_is_served() -> None:
    said = [epoch(1), requested("q1", 2), requested("q2"), opened(1)]
    view = rounds_of(*said, withdrawn("q1"), opened(2))
    assert view.requests["q1"].withdrawn
    assert list(view.rounds) == ["r1"], "what was opened for it is open, and nothing more opens"
    assert view.open_round is view.rounds["r1"]
    assert view.pending is view.requests["q2"]
    assert rounds_of(*said, withdrawn("q1", run_id="other"), withdrawn("q9")) == rounds_of(*said)


def test_the_first_request_to_abort_a_round_that_is_not_aborted_stands() -> None:
    said = [epoch(1), requested("q1", 2), opened(1)]
    view = rounds_of(*said, to_abort(9), to_abort(1, run_id="other"), to_abort(1), to_abort(1))
    assert view.rounds["r1"].abort_requested == to_abort(1)
    assert view.open_round is view.rounds["r1"], "the server decides"
    assert rounds_of(*said, aborted(1), to_abort(1)).rounds["r1"].abort_requested is None


def payloads() -> st.SearchStrategy[types.Payload]:
    numbers, epochs = st.integers(1, 3), st.integers(1, 3)
    ids = st.sampled_from([derived_id(at) for at in range(8)])
    requests = st.sampled_from(["q1", "q2"])
    return st.one_of(
        st.builds(epoch, epochs),
        st.builds(requested, requests, st.integers(1, 3)),
        st.builds(withdrawn, requests),
        st.builds(to_abort, numbers),
        st.builds(lambda n, e, q: opened(n, at_epoch=e, request_id=q), numbers, epochs, requests),
        st.builds(lambda n, e, i: closed(n, i, at_epoch=e), numbers, epochs, ids),
        st.builds(lambda n, e: aborted(n, at_epoch=e), numbers, epochs),
        st.builds(lambda n, e: sent(n, "ann", at_epoch=e), numbers, epochs),
        st.builds(lambda n, s: update(n, seq=s), numbers, st.integers(0, 2)),
        st.builds(lambda n, e, i: refused(n, i, at_epoch=e), numbers, epochs, ids),
        st.builds(lambda n: types.RoundDeclined(ORIGIN, "bob", 0, "main", "0" * 32, "busy", round_id=f"r{n}"), numbers),
    )


@given(st.lists(st.tuples(st.integers(0, 7), payloads()), max_size=60), st.integers(0, 60))
def test_any_events_in_any_order_keep_the_view_consistent_and_a_snapshot_changes_nothing(
    said: list[tuple[int, types.Payload]], cut: int
) -> None:
    began: list[Said] = [("a" * 32, epoch(1)), ("b" * 32, requested("q1", 3)), ("c" * 32, requested("q2", 3))]
    # One id is one event; the ids that decisions name come first.
    events = began + list({derived_id(at): payload for at, payload in said}.items())
    events += [(derived_id("more", at), payload) for at, (_, payload) in enumerate(said)]
    whole, kept = RoundsView(), RoundsView()
    for at, (record, payload) in enumerate(admitted(events, Admit())):
        whole.apply(record, payload)
        kept.apply(record, payload)
        if at == cut:
            kept = RoundsView.from_state(kept.to_state())
    assert kept == whole
    states = list(whole.rounds.values())
    assert [each.number for each in states] == list(range(1, len(states) + 1))
    assert sum(len(each.numbers) for each in whole.requests.values()) == len(states)
    for update_id, (round_id, _) in whole.unanswered.items():
        state = whole.rounds[round_id]
        assert state.state != "open"
        assert update_id not in state.refused
    pending = [each for each in whole.requests.values() if each.pending]
    assert whole.pending is (pending[0] if pending else None)


def test_a_hundred_thousand_events_take_well_under_half_a_second() -> None:
    said: list[types.Payload] = [epoch(1)]
    for number in range(1, 1001):
        said += [requested(f"q{number}"), opened(number, request_id=f"q{number}")]
        said += [sent(number, f"c{client}") for client in range(48)]
        said += [update(number, f"c{client}") for client in range(48)]
        said += [closed(number)]
    events = admitted(numbered(said), Admit())
    view = RoundsView()
    gc.disable()  # it would look through what all the other tests have left
    start = time.process_time()
    try:
        for record, payload in events:
            view.apply(record, payload)
    finally:
        gc.enable()
    assert time.process_time() - start < 1.0  # 0.2 s on an idle core
    assert (len(events), len(view.rounds), len(view.unanswered)) == (99_001, 1000, 48_000)


# --- releases --------------------------------------------------------------------------------------------------------


def proposed(
    number: int, *, at_epoch: int = 1, round_id: str | None = None, blob: BlobRef = BLOB, model: str = "default"
) -> types.ReleaseProposed:
    return types.ReleaseProposed(ORIGIN, model, at_epoch, f"{model}-{number}", number, blob, round_id)


def published(number: int, *, at_epoch: int = 1, blob: BlobRef = BLOB, model: str = "default") -> types.ReleasePublished:
    return types.ReleasePublished(ORIGIN, model, at_epoch, f"{model}-{number}", number, blob)


def rejected(number: int, *, at_epoch: int = 1) -> types.ReleaseRejected:
    return types.ReleaseRejected(ORIGIN, "default", at_epoch, f"default-{number}", "less-accurate")


def evaluated(number: int, accuracy: float, dataset: str = "a", at_epoch: int = 1) -> types.ReleaseEvaluated:
    metrics: dict[str, float | None] = {"accuracy": accuracy}
    return types.ReleaseEvaluated(ORIGIN, "default", at_epoch, f"default-{number}", metrics, "accuracy", 10, dataset * 64)


def rolled_back(to: int, withdrawn: int) -> types.ReleaseRolledBack:
    return types.ReleaseRolledBack(ORIGIN, "default", f"default-{to}", f"default-{withdrawn}", "worse")


def current(view: ReleasesView, model: str = "default") -> str | None:
    state = view.current(model)
    return None if state is None else state.release


def test_a_release_is_in_force_once_it_is_published() -> None:
    first = (proposed(0), published(0))
    assert current(ReleasesView()) is None
    assert current(releases_of(proposed(0))) is None
    assert current(releases_of(*first)) == "default-0"
    view = releases_of(*first, proposed(1, round_id="r1"), evaluated(1, 0.5))
    candidate = view.candidate("default")
    assert candidate is not None
    assert candidate.evaluation is not None
    assert (candidate.release, candidate.evaluation.score, current(view)) == ("default-1", 0.5, "default-0")
    view = releases_of(*first, proposed(1, round_id="r1"), rejected(1), proposed(2), published(2))
    assert (current(view), view.candidate("default"), view.by_round) == ("default-2", None, {"r1": "default-1"})
    assert view.releases["default-1"].status == "rejected"


def test_a_release_is_decided_once_and_as_it_was_proposed() -> None:
    first = (proposed(0), published(0))
    assert current(releases_of(*first, proposed(1), rejected(1), published(1))) == "default-0"
    assert current(releases_of(*first, proposed(1), published(1), rejected(1))) == "default-1"
    assert current(releases_of(*first, proposed(1), published(1, blob=OTHER))) == "default-0"
    assert current(releases_of(*first, published(1))) == "default-0"
    assert list(releases_of(*first, proposed(2)).releases) == ["default-0"]
    view = releases_of(*first, proposed(1, round_id="r1"), proposed(2, round_id="r1"))
    assert list(view.releases) == ["default-0", "default-1"]
    view = releases_of(*first, evaluated(0, 0.5), evaluated(0, 0.9), evaluated(0, 0.7, "b"))
    assert [each.score for each in view.releases["default-0"].evaluations.values()] == [0.5, 0.7]


def test_a_fenced_server_publishes_nothing() -> None:
    first = (proposed(0), published(0))
    view = releases_of(*first, proposed(1, at_epoch=2), published(1, at_epoch=1), proposed(2, at_epoch=1))
    assert (current(view), list(view.releases)) == ("default-0", ["default-0", "default-1"])
    other = (proposed(0, model="m"), published(0, model="m"))
    assert current(releases_of(proposed(0, at_epoch=5), *other), "m") == "m-0"  # each model has its own order


def test_a_rollback_puts_a_published_release_in_force_if_it_names_the_one_that_is() -> None:
    three = [each for number in range(3) for each in (proposed(number), published(number))]
    assert current(releases_of(*three, rolled_back(0, 2))) == "default-0"
    assert current(releases_of(*three, rolled_back(0, 1))) == "default-2"
    assert current(releases_of(*three, rolled_back(0, 2), rolled_back(2, 0))) == "default-2"
    assert current(releases_of(*three, rolled_back(2, 2))) == "default-2"
    assert current(releases_of(*three, proposed(3), rolled_back(3, 2))) == "default-2"
    assert current(releases_of(*three, rolled_back(7, 2))) == "default-2"


@given(
    st.lists(
        st.one_of(
            st.builds(lambda n, e: proposed(n, at_epoch=e, round_id=f"r{n}"), st.integers(0, 3), st.integers(0, 2)),
            st.builds(lambda n, e: published(n, at_epoch=e), st.integers(0, 3), st.integers(0, 2)),
            st.builds(lambda n, e: rejected(n, at_epoch=e), st.integers(0, 3), st.integers(0, 2)),
            st.builds(evaluated, st.integers(0, 3), st.sampled_from([0.1, 0.9]), st.sampled_from("ab")),
            st.builds(rolled_back, st.integers(0, 3), st.integers(0, 3)),
        ),
        max_size=60,
    ),
    st.integers(0, 60),
)
def test_any_release_events_keep_one_published_release_in_force_and_a_snapshot_changes_nothing(
    said: list[types.Payload], cut: int
) -> None:
    whole, kept = ReleasesView(), ReleasesView()
    for at, (record, payload) in enumerate(admitted(numbered(said), Admit())):
        before = current(whole)
        whole.apply(record, payload)
        kept.apply(record, payload)
        if at == cut:
            kept = ReleasesView.from_state(kept.to_state())
        in_force = whole.current("default")
        assert in_force is None or (in_force.status == "published" and not in_force.withdrawn)
        if current(whole) != before:
            assert isinstance(payload, types.ReleasePublished | types.ReleaseRolledBack)
    assert kept == whole
    assert [each.number for each in whole.releases.values()] == list(range(len(whole.releases)))

"""The agent against a log in which the tests append what a server would: capture, masking, publication, standing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw
import pytest
from clients.conftest import settled
from fedloop_clients import Agent, alone, loop
from fedloop_clients.device import Settings, Status
from fedloop_clients.feedback import MAX_COMMENT_CHARS, ConflictingFeedbackError, FeedbackInput
from fedloop_clients.interactions import Interactions
from fedloop_clients.loop import RevokedError
from fedloop_clients.outbox import SuspendedError
from fedloop_clients.store_file import StoreError
from fedloop_events import types
from fedloop_events.errors import LogChangedError, UnreachableError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import Position
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter

if TYPE_CHECKING:
    from clients.conftest import Deployment, DigitMasker

InChild = Callable[[Callable[[], object]], int]
CANARY = "Wilhelmina-"
NUMBER = "4711471147"


def signalling(event: threading.Event) -> Callable[[Status], bool]:
    """Never the end, but the sign that a pass is over."""

    def until(status: Status) -> bool:
        event.set()
        return False

    return until


def give(agent: Agent, text: str = "my card is lost", **given: str) -> str:
    """Feedback on a new response; its id."""
    return agent.feedback(agent.record(text, "card-lost").response_id, **(given or {"thumb": "up"})).feedback_id  # type: ignore[arg-type]


# --- enrolment ---


def test_an_enrolled_device_is_known_to_everybody(deployment: Deployment, agent: Agent) -> None:
    reader = Reader(deployment.log, Identities())
    reader.catch_up()
    client = reader.fold.clients["phone"]
    assert (client.epsilon, client.delta, reader.refused) == (8.0, 1e-5, 0)


def test_enrolling_again_on_the_same_terms_changes_nothing(deployment: Deployment, agent: Agent, store_dir: Path) -> None:
    with Agent.enrol(deployment.folder, store_dir, key_from="file") as again:
        assert again.identity == agent.identity
    assert len(deployment.appended(types.ClientEnrolled)) == 1
    with pytest.raises(UsageError, match="the device phone"):
        Agent.enrol(deployment.folder, store_dir, epsilon=9.0, key_from="file")


def test_an_enrolment_that_was_interrupted_is_ended_later(
    deployment: Deployment, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise UnreachableError("away")

    with monkeypatch.context() as broken:
        broken.setattr(type(deployment.log), "append", away)
        with pytest.raises(UnreachableError):
            Agent.enrol(deployment.folder, store_dir, client_id="phone", key_from="file")
    assert deployment.appended(types.ClientEnrolled) == []
    Agent.enrol(deployment.folder, store_dir, client_id="phone", key_from="file").close()
    assert len(deployment.appended(types.ClientEnrolled)) == 1


def test_a_name_that_is_taken_leaves_no_store_behind(deployment: Deployment, agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="enrolled already"):
        Agent.enrol(deployment.folder, tmp_path / "other", client_id="phone", key_from="file")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "terms",
    [{"client_id": "a b"}, {"client_id": "server"}, {"epsilon": 0.0}, {"epsilon": float("nan")}, {"delta": 1.0}, {"delta": 0.0}],
)
def test_terms_that_make_no_sense_are_refused(deployment: Deployment, store_dir: Path, terms: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Agent.enrol(deployment.folder, store_dir, key_from="file", **terms)  # type: ignore[arg-type]
    assert not store_dir.exists()


@pytest.mark.parametrize("client_id", ["Zo\u00eb", "_x", "-x", ".x", "a b", "x" * 81, "", "a/b", "a\n"])
def test_a_name_that_is_none_is_told_the_whole_rule(deployment: Deployment, store_dir: Path, client_id: str) -> None:
    rule = "1 to 80 ASCII letters, digits, ., - or _, beginning with a letter or digit"
    with pytest.raises(UsageError) as error:
        Agent.enrol(deployment.folder, store_dir, client_id=client_id, key_from="file")
    assert error.value.message == f"client_id must be {rule}, not {client_id!r}"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", client_id) is None
    with (
        Agent.enrol(deployment.folder, store_dir, client_id="0._-" + "x" * 76, key_from="file") as agent,
        pytest.raises(UsageError, match=re.escape(f"response_id must be {rule}")),
    ):
        agent.record("hello", "loan", response_id=client_id)


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff\u2060 \u00ad", "\u3164\u2800"])
def test_a_text_that_shows_nothing_is_empty(agent: Agent, text: str) -> None:
    with pytest.raises(UsageError, match="text is empty"):
        agent.predict(text)
    with pytest.raises(UsageError, match="text is empty"):
        agent.record(text, "loan")


def test_the_store_is_its_owners_alone(agent: Agent, store_dir: Path) -> None:
    assert store_dir.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store_dir.iterdir()} == {0o600}


def test_a_folder_without_a_device_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        Agent.open(tmp_path)


# --- feedback ---


def test_feedback_is_published_masked_with_what_was_masked(deployment: Deployment, agent: Agent) -> None:
    response = agent.record(f"card {NUMBER} is lost", "card-lost")
    mine = agent.feedback(
        response.response_id, rating=2, label="loan", correction=f"{NUMBER} no", comment=f"{NUMBER} {NUMBER}", feedback_id="mine"
    ).feedback_id
    agent.run(until=settled)
    (recorded,) = deployment.appended(types.FeedbackRecorded)
    assert recorded.text.text == "card <NUMBER_1> is lost"
    assert (recorded.feedback_id, recorded.rating, recorded.label, recorded.predicted) == (mine, 2, "loan", "card-lost")
    assert recorded.correction is not None
    assert recorded.comment is not None
    assert (recorded.correction.text, recorded.comment.text) == ("<NUMBER_1> no", "<NUMBER_1> <NUMBER_1>")
    assert [each.counts for each in deployment.appended(types.TextMasked)] == [{"NUMBER": 4}]
    assert agent.status().examples == 1


def test_what_was_shown_beside_a_label_is_masked_and_not_published(deployment: Deployment, agent: Agent) -> None:
    shown, other = (agent.record("my card is lost", label, response=f"call {NUMBER}") for label in ("card-lost", "loan"))
    agent.feedback(shown.response_id, preferred_over=other.response_id)
    agent.run(until=settled)
    (recorded,) = deployment.appended(types.FeedbackRecorded)
    assert (recorded.predicted, recorded.response, recorded.preferred_over) == ("card-lost", None, other.response_id)
    assert {each.response.text for each in agent._device.interactions.judged() if each.response} == {"call <NUMBER_1>"}


@pytest.mark.parametrize("rest", [{"thumb": "up"}, {"rating": 5}, {"label": "card-lost"}])
@pytest.mark.parametrize(
    ("remark", "kept", "note"),
    [
        ("", None, "left out: comment is empty"),
        (" \u200b", None, "left out: comment is empty"),
        ("x" * (MAX_COMMENT_CHARS + 1), None, "left out: comment has 2,001 characters"),
        ("thanks \ud83d", "thanks \ufffd", "half a character"),
        ("\udc80\udc81", "\ufffd\ufffd", "half a character"),
        ("thanks", "thanks", ""),
    ],
)
def test_a_remark_that_cannot_be_kept_does_not_stop_the_rest(
    deployment: Deployment, agent: Agent, rest: dict[str, Any], remark: str, kept: str | None, note: str
) -> None:
    response = agent.record("my card is lost", "card-lost").response_id
    for _ in range(2):
        recorded = agent.feedback(response, **rest, comment=remark, feedback_id="mine")
        assert recorded.teaches == "card-lost"
        assert note in recorded.note
        assert bool(note) == bool(recorded.note)
    agent.run(until=settled)
    (published,) = deployment.appended(types.FeedbackRecorded)
    assert (published.comment and published.comment.text) == kept
    assert rest.items() <= {name: getattr(published, name) for name in rest}.items()


def test_a_remark_that_cannot_be_kept_is_refused_where_nothing_else_is_given(agent: Agent) -> None:
    response = agent.record("my card is lost", "card-lost").response_id
    for given in ({"correction": ""}, {"comment": "\u200b"}, {"correction": "", "comment": ""}):
        with pytest.raises(UsageError, match="is empty"):
            agent.feedback(response, **given)  # type: ignore[arg-type]
    assert agent.feedback(response, correction="", thumb="down").note == "the correction is left out: correction is empty"


def test_nothing_that_a_user_wrote_is_readable_outside_the_process(
    deployment: Deployment, agent: Agent, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        give(agent, f"{NUMBER} card", comment=NUMBER)
    give(agent, f"{CANARY} unmaskable", comment=CANARY)
    give(agent, f"{CANARY} explosive", correction=CANARY)
    agent.run(until=lambda status: not status.waiting and not status.unsent)
    stored = b"".join(path.read_bytes() for path in store_dir.rglob("*") if path.is_file())
    output = "".join(capfd.readouterr())
    for secret in (NUMBER, CANARY):
        assert secret.encode() not in deployment.bytes()
        assert secret.encode() not in stored
        assert secret not in output + repr(agent.status())


def test_an_id_that_the_caller_gave_stays_on_the_device(deployment: Deployment, agent: Agent, tmp_path: Path) -> None:
    name, session = "jane.doe.02079460018", "session-of-jane.doe"
    response = agent.record("my card is lost", "card-lost", response_id=session)
    worse = agent.record("my card is lost", "loan", response_id="other")
    given = agent.feedback(session, thumb="up", preferred_over="other", feedback_id=name)
    for response_id, feedback_id in ((response.response_id, name), (session, given.feedback_id)):
        again = agent.feedback(response_id, thumb="up", preferred_over=worse.response_id, feedback_id=feedback_id)
        assert again == given
    with pytest.raises(ConflictingFeedbackError):
        agent.feedback(session, thumb="down", feedback_id=name)
    with pytest.raises(UsageError, match="is taken"):
        agent.record("another", "loan", response_id=session)
    assert agent.knows(name)
    assert not agent.knows("jane")
    agent.run(until=settled)
    (recorded,) = deployment.appended(types.FeedbackRecorded)
    assert (recorded.feedback_id, recorded.response_id) == (given.feedback_id, response.response_id)
    assert [each.feedback_id for each in deployment.appended(types.TextMasked)] == [given.feedback_id]
    for each in (name, session, "jane"):
        assert each.encode() not in deployment.bytes()
    with Agent.enrol(deployment.folder, tmp_path / "other", client_id="tablet", key_from="file") as other:
        assert other.record("hello", "loan", response_id=session).response_id != response.response_id


def test_an_id_that_was_given_before_such_ids_were_derived_is_not_published_either(deployment: Deployment, agent: Agent) -> None:
    interactions, words = agent._device.interactions, agent.task.words
    interactions.respond("old", None, "card-lost", "0000-a", words, response_id="old.jane")
    digest, _ = interactions.record("old.jane", FeedbackInput(thumb="up", comment="as it was"), words, "f.jane")
    assert digest == "f.jane"
    assert agent.feedback("old.jane", thumb="up", comment="as it was", feedback_id="f.jane").feedback_id == "f.jane"
    agent.run(until=settled)
    (recorded,) = deployment.appended(types.FeedbackRecorded)
    assert recorded.comment is not None
    assert recorded.comment.text == "as it was"
    assert b"jane" not in deployment.bytes()
    again = agent.feedback("old.jane", thumb="up", comment="as it was", feedback_id="f.jane")
    assert again.feedback_id == recorded.feedback_id
    assert agent.status().published == 1


def test_what_cannot_be_masked_stays_and_the_rest_goes_on(deployment: Deployment, agent: Agent) -> None:
    give(agent, "unmaskable")
    give(agent, "hello", comment="explosive")
    fine = give(agent, "hello")
    agent.run(until=settled)
    assert [each.feedback_id for each in deployment.appended(types.FeedbackRecorded)] == [fine]
    assert len(deployment.appended(types.TextMasked)) == 1
    status = agent.status()
    assert (status.published, status.failed) == (1, {"the deadline passed": 1, "ValueError": 1})


def test_feedback_too_large_for_an_event_is_kept_back(deployment: Deployment, agent: Agent) -> None:
    give(agent, "\x01" * 9_999 + "x", comment="\x01" * 1_999 + "x")
    agent.run(until=settled)
    assert deployment.appended(types.FeedbackRecorded) == []
    assert agent.status().failed == {"too large for one event": 1}


def test_events_of_the_device_are_numbered_densely_and_signed(deployment: Deployment, agent: Agent) -> None:
    for _ in range(3):
        give(agent)
    agent.run(until=settled)
    own = [*deployment.appended(types.ClientEvent)]
    assert [each.seq for each in own] == list(range(len(own)))
    reader = Reader(deployment.log, Identities(), identities=Identities())
    reader.catch_up()
    assert reader.refused == 0


def test_feedback_needs_no_log(deployment: Deployment, agent: Agent, store_dir: Path, masker: DigitMasker) -> None:
    response = agent.record("hello", "loan")
    agent.run(until=settled)
    deployment.log.close()
    deployment.folder.joinpath("log.sqlite").chmod(0)
    assert agent.feedback(response.response_id, label="loan").teaches == "loan"


def test_another_process_can_take_feedback_while_the_agent_runs(deployment: Deployment, agent: Agent, store_dir: Path) -> None:
    response = agent.record("my card is lost", "card-lost")
    program = (
        "import sys\nfrom fedloop_clients import Agent\n"
        "with Agent.open(sys.argv[1]) as agent:\n"
        "    for number in range(20): agent.feedback(sys.argv[2], rating=4, feedback_id=f'other-{number}')\n"
    )
    running = threading.Thread(target=agent.run, kwargs={"until": lambda status: status.published == 40 and status.settled})
    running.start()
    other = subprocess.Popen([sys.executable, "-c", program, str(store_dir), response.response_id])
    for number in range(20):
        agent.feedback(response.response_id, rating=5, feedback_id=f"own-{number}")
    assert other.wait(60) == 0
    running.join(60)
    assert not running.is_alive()
    recorded = deployment.appended(types.FeedbackRecorded)
    given = {f"{who}-{number}" for who in ("own", "other") for number in range(20)}
    assert {each.feedback_id for each in recorded} == {agent.identity.derived_id("feedback", each) for each in given}
    assert len(recorded) == 40


def test_only_one_process_runs_a_device(agent: Agent, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "TIMEOUT_S", 0.1)
    stop, started = threading.Event(), threading.Event()
    running = threading.Thread(target=agent.run, args=(stop, signalling(started)))
    running.start()
    assert started.wait(30)
    with Agent.open(store_dir) as other, pytest.raises(UnreachableError, match="another process runs"):
        other.run(until=settled)
    stop.set()
    running.join(30)
    agent.run(until=settled)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_killed_while_it_publishes_publishes_once(
    deployment: Deployment,
    agent: Agent,
    store_dir: Path,
    masker: DigitMasker,
    in_child: Callable[[Callable[[], object]], int],
    when: str,
) -> None:
    give(agent)
    agent.close()
    append = type(deployment.log).append

    def fatal(log: object, events: list[object]) -> None:
        if when == "after":
            append(log, events)  # type: ignore[arg-type]
        if any("feedback" in event.topic for event in events):  # type: ignore[attr-defined]
            os.kill(os.getpid(), 9)
        append(log, events)  # type: ignore[arg-type]

    def work() -> None:
        type(deployment.log).append = fatal  # type: ignore[assignment,method-assign]
        with Agent.open(store_dir, masker=masker) as again:
            again.run(until=settled)

    assert in_child(work) == -9
    with Agent.open(store_dir, masker=masker) as again:
        again.run(until=settled)
    assert len(deployment.appended(types.FeedbackRecorded)) == len(deployment.appended(types.TextMasked)) == 1
    own = deployment.appended(types.ClientEvent)
    assert [each.seq for each in own] == list(range(len(own)))


def test_the_number_of_examples_is_read_again_only_when_the_store_has_changed(
    agent: Agent, store_dir: Path, masker: DigitMasker, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(agent)
    agent.run(until=settled)
    assert agent.status().examples == 1
    with monkeypatch.context() as patched:
        patched.setattr(Interactions, "judged", None)
        assert [agent.status().examples for _ in range(3)] == [1, 1, 1]
    with Agent.open(store_dir, masker=masker) as other:
        other.feedback(other.record("hello", "loan").response_id, thumb="up")
        assert agent.status().examples == 1
        other.run(until=settled)
    assert agent.status().examples == 2


# --- heartbeat ---


def test_a_heartbeat_is_appended_at_the_start_and_when_the_power_of_two_changes(deployment: Deployment, agent: Agent) -> None:
    for number in range(5):
        give(agent, f"text {number}")
        agent.run(until=settled)
    assert [each.examples_at_least for each in deployment.appended(types.ClientSeen)] == [1, 2, 2, 4, 4]


def test_a_heartbeat_is_appended_again_after_a_while(deployment: Deployment, store_dir: Path, masker: DigitMasker) -> None:
    settings = Settings(heartbeat_s=0.0)
    with Agent.enrol(deployment.folder, store_dir, key_from="file", masker=masker, settings=settings) as agent:
        passes = iter(range(3))
        agent.run(until=lambda status: next(passes, None) is None)
    assert len(deployment.appended(types.ClientSeen)) == 4


# --- releases ---


def test_the_release_in_force_is_the_logs(deployment: Deployment, agent: Agent) -> None:
    first, second = deployment.base_release, deployment.release()
    assert agent.record("hello", "loan").release == second
    rolled_back = types.ReleaseRolledBack(origin="test.example", model="default", release=first, withdrawn=second, reason="worse")
    EventWriter(deployment.log, SigningKey.generate()).append(rolled_back)
    assert agent.record("hello", "loan").release == second
    deployment.server.append(rolled_back)
    assert agent.record("hello", "loan").release == first


def test_without_a_release_there_is_nothing_to_predict_with(tmp_path: Path, store_dir: Path) -> None:
    from fedloop_events.locations import open_log

    log = open_log(tmp_path / "empty", create=True)
    server = EventWriter(log, SigningKey.generate())
    with pytest.raises(UsageError, match="no deployment"):
        Agent.enrol(tmp_path / "empty", store_dir, key_from="file")
    server.append(types.DeploymentCreated(origin="o", public_key=server.key.public_key))
    with Agent.enrol(tmp_path / "empty", store_dir, key_from="file") as agent:
        with pytest.raises(UsageError, match="no release"):
            agent.predict("hello")
        with pytest.raises(UsageError):
            agent.feedback("unknown", label="loan")
    log.close()


# --- standing ---


def test_a_revoked_device_stops(deployment: Deployment, agent: Agent) -> None:
    deployment.server.append(types.ClientRevoked(origin="test.example", client_id="phone", reason="lost"))
    with pytest.raises(RevokedError):
        agent.run(until=settled)


def test_a_store_from_a_backup_goes_on_where_the_log_is(
    deployment: Deployment, agent: Agent, store_dir: Path, masker: DigitMasker, tmp_path: Path
) -> None:
    kept = give(agent, "kept")
    agent.close()
    shutil.copytree(store_dir, tmp_path / "backup")
    with Agent.open(store_dir, masker=masker) as agent:
        give(agent, "lost with the store")
        agent.run(until=settled)
    with Agent.open(tmp_path / "backup", masker=masker) as restored:
        give(restored, "new")
        restored.run(until=settled)
    recorded = deployment.appended(types.FeedbackRecorded)
    assert [each.text.text for each in recorded] == ["kept", "lost with the store", "new"]
    assert [each.feedback_id for each in recorded].count(kept) == 1
    own = deployment.appended(types.ClientEvent)
    assert [each.seq for each in own] == list(range(len(own)))


def test_a_device_whose_store_was_copied_stops_when_both_copies_have_appended(
    deployment: Deployment, agent: Agent, store_dir: Path, masker: DigitMasker, tmp_path: Path
) -> None:
    agent.close()
    shutil.copytree(store_dir, tmp_path / "copy")
    with Agent.open(store_dir, masker=masker) as one, Agent.open(tmp_path / "copy", masker=masker) as other:
        stop, reached = threading.Event(), threading.Event()
        problems: list[BaseException] = []
        give(one, "appended under number 1")

        def run() -> None:
            try:
                one.run(stop, signalling(reached))
            except SuspendedError as error:
                problems.append(error)

        running = threading.Thread(target=run)
        # The copy has read the log before the other appends, and then appends under the same number.
        other.status()
        running.start()
        assert reached.wait(30)
        from fedloop_clients.outbox import Outbox

        clone = Outbox(other._device.store, other.identity.writer(deployment.log))
        clone.add(lambda seq: types.ClientSeen(origin="test.example", client_id="phone", seq=seq, examples_at_least=0))
        clone.flush(deployment.log)
        running.join(30)
        stop.set()
        assert len(problems) == 1
    for folder in (store_dir, tmp_path / "copy"):
        with Agent.open(folder, masker=masker) as again, pytest.raises(SuspendedError, match="number 1 of this device"):
            again.run(until=settled)


def test_a_log_that_was_cut_short_is_refused(deployment: Deployment, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.run(until=settled)
    monkeypatch.setattr(type(deployment.log), "end", lambda log: Position({"log": 3}))
    with pytest.raises(LogChangedError, match="ends before"):
        agent.run(until=settled)


def test_another_deployment_in_its_place_is_refused(
    deployment: Deployment, agent: Agent, store_dir: Path, tmp_path: Path
) -> None:
    other = type(deployment)(tmp_path / "other")
    with Agent.open(store_dir, other.folder) as moved, pytest.raises(LogChangedError):
        moved.run(until=settled)
    other.log.close()


def test_a_log_that_is_away_is_waited_for(deployment: Deployment, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "RETRY_S", 0.01)
    append, failures = type(deployment.log).append, iter(range(3))

    def unsteady(log: object, events: list[object]) -> None:
        if next(failures, None) is not None:
            raise UnreachableError("the log is away")
        append(log, events)  # type: ignore[arg-type]

    monkeypatch.setattr(type(deployment.log), "append", unsteady)
    give(agent)
    seen: list[str] = []

    def until(status: Status) -> bool:
        seen.append(status.problem)
        return status.settled

    agent.run(until=until)
    assert "the log is away" in seen
    assert seen[-1] == ""
    assert len(deployment.appended(types.FeedbackRecorded)) == 1


def test_a_stop_is_heeded(agent: Agent) -> None:
    stop = threading.Event()
    running = threading.Thread(target=agent.run, args=(stop,))
    running.start()
    stop.set()
    running.join(30)
    assert not running.is_alive()


def test_a_log_that_is_cut_while_the_device_runs_stops_it_at_once(deployment: Deployment, agent: Agent) -> None:
    agent.run(until=settled)

    def until(status: Status) -> bool:
        path = deployment.folder / "log.sqlite"
        connection = apsw.Connection(str(path))
        trigger = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'events_no_delete'").get
        with connection:
            connection.execute("DROP TRIGGER events_no_delete")
            connection.execute("DELETE FROM events WHERE position > 2")
            connection.execute(trigger)
        connection.close()
        return False

    with pytest.raises(LogChangedError, match="the log ends before event"):
        agent.run(until=until)
    with pytest.raises(LogChangedError, match="the log ends before event") as again:
        agent.run()
    assert "restore the whole log" in again.value.hint

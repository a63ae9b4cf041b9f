"""Feedback that is taken back: gone from the device, retracted in the log, and never there again."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clients.conftest import back_up, settled, unpack
from clients.test_recorded import InChild, traced
from fedloop_clients import Agent
from fedloop_clients.feedback import UnknownResponseError
from fedloop_clients.publishing import Publisher
from fedloop_clients.retracting import RetractedFeedbackError, UnknownFeedbackError
from fedloop_events import types
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from sqlcipher3 import dbapi2

if TYPE_CHECKING:
    from clients.conftest import Deployment, DigitMasker

Row = tuple[object, ...]
RECORDED = Path(__file__).parent / "recorded" / "store_v2"


def give(agent: Agent, feedback_id: str, text: str = "my card is lost") -> str:
    """Feedback with every kind of text; its response's id."""
    response = agent.record(text, "card-lost", response=f"about {text}")
    agent.feedback(response.response_id, label="loan", correction=f"no, {text}", comment=text, feedback_id=feedback_id)
    return response.response_id


def kept(agent: Agent) -> dict[str, list[Row]]:
    """The rows of feedback, responses and texts."""
    rows = agent._device.store.rows
    return {
        "feedback": rows("SELECT feedback_id FROM feedback"),
        "responses": rows("SELECT response_id FROM responses"),
        "texts": rows("SELECT owner, kind FROM texts"),
    }


def retracted(deployment: Deployment) -> list[str]:
    return [each.feedback_id for each in deployment.appended(types.FeedbackRetracted)]


def recorded(deployment: Deployment) -> list[str]:
    return [each.feedback_id for each in deployment.appended(types.FeedbackRecorded)]


def own(agent: Agent, *given: str) -> list[str]:
    """The device's own ids of feedback, in place of those that the caller gave."""
    return [agent.identity.derived_id("feedback", each) for each in given]


NOTHING: dict[str, list[Row]] = {"feedback": [], "responses": [], "texts": []}


def test_feedback_that_was_never_published_leaves_nothing_in_the_log(deployment: Deployment, agent: Agent) -> None:
    give(agent, "mine")
    assert not agent.retract("mine").published
    assert kept(agent) == NOTHING
    agent.run(until=settled)
    assert (recorded(deployment), retracted(deployment), deployment.appended(types.TextMasked)) == ([], [], [])


def test_published_feedback_is_gone_from_the_device_and_retracted_in_the_log(deployment: Deployment, agent: Agent) -> None:
    give(agent, "mine")
    give(agent, "other")
    agent.run(until=settled)
    assert agent.status().examples > 0
    retraction = agent.retract("mine")
    assert retraction.published
    assert "epsilon is spent" in retraction.remains
    assert kept(agent)["feedback"] == [(each,) for each in own(agent, "other")]
    assert not agent.status().settled
    agent.retract("other")
    assert (agent.status().examples, kept(agent)) == (0, NOTHING)
    agent.run(until=settled)
    assert recorded(deployment) == own(agent, "mine", "other")
    assert sorted(retracted(deployment)) == sorted(own(agent, "mine", "other"))
    appended = deployment.appended(types.ClientEvent)
    assert [each.seq for each in appended] == list(range(len(appended)))
    reader = Reader(deployment.log, Identities(), identities=Identities())
    reader.catch_up()
    assert reader.refused == 0
    assert {name for each in deployment.appended(types.FeedbackRetracted) for name in each.__struct_fields__} == {
        "origin",
        "client_id",
        "seq",
        "feedback_id",
    }


def test_feedback_in_the_outbox_is_followed_by_its_retraction(deployment: Deployment, agent: Agent) -> None:
    agent.run(until=settled)
    give(agent, "mine")
    Publisher(agent._device, agent._masked_together).publish()
    assert agent.retract("mine").published
    assert recorded(deployment) == []
    agent.run(until=settled)
    assert [type(each) for each in deployment.appended(types.ClientEvent) if each.topic == "feedback"] == [
        types.FeedbackRecorded,
        types.FeedbackRetracted,
    ]


def test_a_retraction_wins_over_a_publication_that_has_begun(
    deployment: Deployment, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(agent, "mine")
    publish = Publisher._publish

    def late(publisher: Publisher, each: object) -> None:
        agent.retract("mine")
        publish(publisher, each)  # type: ignore[arg-type]

    monkeypatch.setattr(Publisher, "_publish", late)
    agent.run(until=settled)
    assert (recorded(deployment), retracted(deployment)) == ([], [])


def test_retracting_again_changes_nothing(deployment: Deployment, agent: Agent) -> None:
    give(agent, "mine")
    agent.run(until=settled)
    first = agent.retract("mine")
    assert agent.retract("mine") == first
    agent.run(until=settled)
    assert agent.retract("mine") == first
    agent.run(until=settled)
    assert retracted(deployment) == own(agent, "mine")


def test_a_retracted_id_is_never_recorded_again(deployment: Deployment, agent: Agent) -> None:
    response = give(agent, "mine")
    agent.retract("mine")
    with pytest.raises(UnknownResponseError):
        agent.feedback(response, thumb="up", feedback_id="new")
    with pytest.raises(RetractedFeedbackError, match="was retracted"):
        give(agent, "mine")
    assert kept(agent)["feedback"] == []


def test_an_id_that_this_device_does_not_know_is_refused(agent: Agent) -> None:
    with pytest.raises(UnknownFeedbackError, match="no feedback of this device"):
        agent.retract("nobody")


def test_a_response_stays_while_other_feedback_is_about_it(agent: Agent) -> None:
    response = give(agent, "mine")
    worse = agent.record("my card is lost", "loan").response_id
    agent.feedback(response, preferred_over=worse, feedback_id="other")
    agent.retract("mine")
    assert kept(agent)["responses"] == [(response,), (worse,)]
    assert kept(agent)["texts"] == [(response, "prompt"), (response, "response"), (worse, "prompt")]
    agent.retract("other")
    assert kept(agent) == NOTHING


def test_an_agent_that_runs_appends_what_another_process_retracts(
    deployment: Deployment, agent: Agent, store_dir: Path, in_child: InChild
) -> None:
    give(agent, "mine")
    agent.run(until=settled)
    stop = threading.Event()
    running = threading.Thread(target=agent.run, args=(stop, lambda _: bool(retracted(deployment))))
    running.start()
    with Agent.open(store_dir) as other:
        other.retract("mine")
    running.join(60)
    stop.set()
    assert retracted(deployment) == own(agent, "mine")


@pytest.mark.parametrize("again", [False, True], ids=["untouched", "retracted-again"])
@pytest.mark.parametrize("saved", ["captured", "published"])
def test_a_store_restored_from_a_backup_deletes_again_what_the_log_retracts(
    deployment: Deployment, agent: Agent, store_dir: Path, tmp_path: Path, masker: DigitMasker, saved: str, again: bool
) -> None:
    agent.run(until=settled)
    give(agent, "mine")
    if saved == "captured":
        back_up(agent, tmp_path / "backup")
    agent.run(until=settled)
    if saved == "published":
        back_up(agent, tmp_path / "backup")
    agent.retract("mine")
    agent.run(until=settled)
    agent.close()
    with Agent.open(tmp_path / "backup", masker=masker) as restored:
        if again:
            restored.retract("mine")
        restored.run(until=settled)
        assert (kept(restored), restored.status().examples) == (NOTHING, 0)
        with pytest.raises(RetractedFeedbackError):
            give(restored, "mine")
    assert (recorded(deployment), retracted(deployment)) == (own(agent, "mine"), own(agent, "mine"))


def test_a_restored_store_that_retracts_what_it_does_not_know_to_be_published_retracts_it_in_the_log(
    deployment: Deployment, agent: Agent, store_dir: Path, tmp_path: Path, masker: DigitMasker
) -> None:
    agent.run(until=settled)
    give(agent, "mine")
    back_up(agent, tmp_path / "backup")
    agent.run(until=settled)
    agent.close()
    with Agent.open(tmp_path / "backup", masker=masker) as restored:
        assert not restored.retract("mine").published
        restored.run(until=settled)
    assert (recorded(deployment), retracted(deployment)) == (own(agent, "mine"), own(agent, "mine"))


def test_a_restored_store_that_has_read_the_log_knows_what_is_published_also_before_it_is_masked_again(
    agent: Agent, tmp_path: Path, masker: DigitMasker
) -> None:
    agent.run(until=settled)
    give(agent, "mine")
    back_up(agent, tmp_path / "backup")
    agent.run(until=settled)
    agent.close()
    with Agent.open(tmp_path / "backup", masker=masker) as restored:
        assert restored.status().waiting == 1
        assert restored.retract("mine").published


def test_what_version_1_had_published_is_known_as_published_without_the_log(tmp_path: Path) -> None:
    unpack(RECORDED.with_name("store_v1"), tmp_path)
    with Agent.open(tmp_path / "device", tmp_path / "gone") as agent:
        ((published,), *_) = agent._device.store.rows("SELECT feedback_id FROM feedback WHERE state = 'published'")
        assert agent.retract(published).published


def test_a_process_killed_anywhere_in_a_retraction_leaves_all_of_it_or_nothing(
    deployment: Deployment, agent: Agent, store_dir: Path, masker: DigitMasker, in_child: InChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(agent, "mine")
    agent.run(until=settled)
    before = kept(agent)
    agent._device.store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    agent.close()
    ran: list[str] = []
    shutil.copytree(store_dir, store_dir.with_name("counted"))
    with monkeypatch.context() as patched:
        patched.setattr(dbapi2, "connect", traced(ran.append))
        with Agent.open(store_dir.with_name("counted"), deployment.folder) as counted:
            ran.clear()
            counted.retract("mine")
    assert len(ran) > 8
    for fatal in range(len(ran)):

        def work(fatal: int = fatal) -> None:
            begun: list[bool] = []

            def die(_: str) -> None:
                if begun:
                    if len(begun) > fatal:
                        os.kill(os.getpid(), 9)
                    begun.append(True)

            dbapi2.connect = traced(die)
            with Agent.open(store_dir, masker=masker) as again:
                begun.append(True)
                again.retract("mine")

        assert in_child(work) == -9
        with Agent.open(store_dir, masker=masker) as again:
            assert kept(again) == before
            assert again.status().settled
    with Agent.open(store_dir, masker=masker) as again:
        again.retract("mine")
        again.run(until=settled)
    assert retracted(deployment) == own(agent, "mine")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_killed_while_it_appends_a_retraction_appends_it_once(
    deployment: Deployment, agent: Agent, store_dir: Path, masker: DigitMasker, in_child: InChild, when: str
) -> None:
    give(agent, "mine")
    agent.run(until=settled)
    agent.retract("mine")
    agent.close()
    append = type(deployment.log).append

    def fatal(log: object, events: list[object]) -> None:
        if when == "after":
            append(log, events)  # type: ignore[arg-type]
        if any("retracted" in event.type for event in events):  # type: ignore[attr-defined]
            os.kill(os.getpid(), 9)
        append(log, events)  # type: ignore[arg-type]

    def work() -> None:
        type(deployment.log).append = fatal  # type: ignore[assignment,method-assign]
        with Agent.open(store_dir, masker=masker) as again:
            again.run(until=settled)

    assert in_child(work) == -9
    with Agent.open(store_dir, masker=masker) as again:
        again.run(until=settled)
        assert kept(again) == NOTHING
    assert retracted(deployment) == own(agent, "mine")


def test_a_store_of_version_2_opens_loses_nothing_and_can_take_back(tmp_path: Path, masker: DigitMasker) -> None:
    unpack(RECORDED, tmp_path)
    with Agent.open(tmp_path / "device", tmp_path / "deployment", masker=masker) as agent:
        rows = agent._device.store.rows
        assert rows("SELECT feedback_id, state FROM feedback ORDER BY number") == [
            ("published", "published"),
            ("published-too", "published"),
            ("failed", "failed"),
            ("captured", "captured"),
            ("captured-too", "captured"),
        ]
        assert agent.status().examples == 2
        assert [agent.retract(each).published for each in ("published", "captured", "failed")] == [True, False, False]
        agent.run(until=settled)
        assert agent.status().published == 2

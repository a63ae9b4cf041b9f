"""Run with the store on a small disk by `test_full_disk.py`, in a process of its own: what a device does when that is full."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clients.classified import TEXTS, Classified
from clients.conftest import Deployment, DigitMasker
from clients.test_instructions import Trainer
from fedloop_clients import Agent
from fedloop_clients.device import Status
from fedloop_clients.store_file import NotWritableError, StoreError
from fedloop_events import types
from fedloop_tasks.classification.model import EmbeddingClassifier

FULL = "is full (0 bytes are free)"


def fill(folder: Path, free_bytes: int = 0) -> None:
    try:
        with (folder / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        os.truncate(folder / "fill", (folder / "fill").stat().st_size - free_bytes)


def says(what: str, kind: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(what)):
        call()


def command(*words: str | Path) -> tuple[int, str]:
    """Its exit status, and what it writes on standard error."""
    program = [sys.executable, "-m", "fedloop_cli.main", *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def killed(store: Path, agent: Agent) -> None:
    """Leave the store as a process leaves it that was killed: with what is not yet in the database, without what was shared."""
    kept = {name: (store / name).read_bytes() for name in ("store.db", "store.db-wal")}
    agent.close()
    for name, content in kept.items():
        (store / name).write_bytes(content)


def reads_go_on(agent: Agent, release: str) -> None:
    status = agent.status()
    assert (status.waiting, status.release, status.spends) == (1, release, 0), status
    assert FULL in status.problem
    response = agent.predict(TEXTS["loan"])
    assert (response.label, response.response_id) == ("loan", ""), response
    assert FULL in response.note


def writes_say_so(agent: Agent, given: str) -> None:
    for write in (
        lambda: agent.record("hello", "loan"),
        lambda: agent.feedback(given, thumb="down"),
        lambda: agent.feedback(agent.predict("hello").response_id, thumb="down"),
        lambda: agent.retract("before"),
        agent.run,
    ):
        says(f"{FULL}: nothing was written", NotWritableError, write)


def commands_say_so(folder: Path, where: str, given: str) -> None:
    store = ("--store", folder / "store")
    assert command("agent", "status", *store)[0] == 0
    for words in (
        ("agent", "feedback", "--response", given, "--thumb", "down", *store),
        ("agent", "feedback", "--text", "hello", "--predicted", "loan", "--thumb", "up", *store),
        ("agent", "run", "--until-settled", *store),
        ("agent", "retract", "before", *store),
        ("agent", "enrol", where, "--key-from", "file", "--client-id", "tablet", "--store", folder / "another"),
        ("init", "compose", folder / "composed"),
    ):
        ended, error = command(*words)
        assert ended in (1, 2), (words, error)
        assert FULL in error, (words, error)
        assert "make room" in error, (words, error)
        assert [line.partition(":")[0] for line in error.splitlines()][:1] == ["error"]


def answered(deployment: Deployment) -> tuple[int, int, int]:
    kinds = (types.BudgetSpent, types.UpdateSubmitted, types.RoundDeclined)
    spent, submitted, declined = (len(deployment.appended(kind)) for kind in kinds)
    return spent, submitted, declined


def fills_up_while_it_runs(folder: Path, deployment: Deployment, agent: Agent, trainer: Trainer) -> None:
    """Room is made once the loop has reported that there is none: until then nothing is paid for."""
    problems: list[str] = []
    touched = trainer.count()

    def until(status: Status) -> bool:
        if not problems:
            fill(folder, 40 << 10)  # room enough to pay, and perhaps not for the answer
            deployment.ask("phone")
            problems.append("")
        elif status.problem and (folder / "fill").exists():
            assert "is full (" in status.problem
            assert deployment.appended(types.BudgetSpent)[1:] == []
            assert trainer.count() == touched
            (folder / "fill").unlink()
            problems.append(status.problem)
        return len(problems) > 1 and status.spends == 2 and status.settled

    agent.run(until=until)
    assert answered(deployment) == (2, 2, 0)


def main(folder: Path, beside: Path, how: str) -> None:
    deployment = Classified(beside / "deployment")
    deployment.register()
    deployment.arrays = deployment.model.initial_arrays(0)
    deployment.arrays["head.weight"] = EmbeddingClassifier(deployment.model.spec, device="cpu").embed(list(TEXTS.values()))
    release, trainer, store = deployment.release(), Trainer(beside / "touched"), folder / "store"
    terms = {"apps": {"main": trainer.app}, "masker": DigitMasker()}
    agent = Agent.enrol(deployment.folder, store, client_id="phone", key_from="file", **terms)  # type: ignore[arg-type]
    agent.run(until=lambda status: status.settled)
    given = agent.record("hello 4711", "loan").response_id
    agent.feedback(given, thumb="up", feedback_id="before")
    if how == "killed":
        killed(store, agent)
    elif how == "closed":
        agent.close()
    deployment.ask("phone")
    fill(folder)
    one, other = (Agent.open(store, **terms) for _ in range(2))  # type: ignore[arg-type]
    for each in (one, other, *([agent] if how == "open" else ())):
        reads_go_on(each, release)
        writes_say_so(each, given)
    commands_say_so(folder, str(deployment.folder), given)
    assert (answered(deployment), trainer.count()) == ((0, 0, 0), 0)
    (folder / "fill").unlink()
    assert not one.status().problem
    other.feedback(given, thumb="down", feedback_id="after")
    one.run(until=lambda status: status.settled and sum(status.answers.values()) == 1)
    assert (answered(deployment), trainer.count()) == ((1, 1, 0), 1)
    assert [each.thumb for each in deployment.appended(types.FeedbackRecorded)] == ["up", "down"]
    own = deployment.appended(types.ClientEvent)
    assert [each.seq for each in own if each.client_id == "phone"] == list(range(len(own)))
    assert [each.client_id for each in deployment.appended(types.ClientEnrolled)] == ["phone"]
    fills_up_while_it_runs(folder, deployment, one, trainer)
    Agent.enrol(deployment.folder, folder / "another", client_id="tablet", key_from="file").close()
    for each in (one, other, agent):
        each.close()
    read_only(folder, deployment, release)


def read_only(folder: Path, deployment: Deployment, release: str) -> None:
    """As a disk that fails is made."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with Agent.open(folder / "store") as agent:
        status = agent.status()
        assert (status.release, status.published) == (release, 2)
        assert "read-only" in status.problem
        says("read-only: nothing was written", NotWritableError, lambda: agent.record("hello", "loan"))
        says("read-only: nothing was written", NotWritableError, agent.run)
    says("store folder", StoreError, lambda: Agent.enrol(deployment.folder, folder / "third"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Feedback from files: a message counts once, whatever the file looks like, and nothing is recorded of a file that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from clients.conftest import DigitMasker
from clients.test_agent_classifier import TEXTS, Classified
from fedloop_clients import Agent
from fedloop_clients.importing import Imported, take_in
from fedloop_events.errors import UsageError
from fedloop_tasks.table import DEFAULT

pytestmark = pytest.mark.slow

ROWS = ["my card is gone,card-lost", '"I need\na loan",loan', "where is it?,transfer", "where is it?,transfer"]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classified]:
    made = Classified(tmp_path_factory.mktemp("classified"))
    made.register()
    made.arrays = made.model.initial_arrays(0)
    made.arrays["head.weight"] = made.model.embed(list(TEXTS.values()))
    made.release()
    yield made
    made.log.close()


@pytest.fixture
def agent(deployment: Classified, tmp_path: Path) -> Iterator[Agent]:
    with Agent.enrol(deployment.folder, tmp_path / "store", key_from="file", masker=DigitMasker()) as agent:
        yield agent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.csv"


def given(agent: Agent, path: Path, *rows: str, end: str = "\n", skip_bad: bool = False) -> Imported:
    """What becomes of a file of these rows."""
    text = "\n".join(["text,label", *rows, ""])
    path.write_bytes(text.replace("\n", end).encode())
    return take_in(agent, DEFAULT.read(path), skip_bad=skip_bad)


def counted(agent: Agent) -> int:
    return sum(agent._device.interactions.counts().values())


def test_a_file_that_grew_was_reordered_or_has_other_line_ends_counts_each_message_once(agent: Agent, path: Path) -> None:
    first = given(agent, path, *ROWS)
    assert (first.recorded, first.known) == (4, 0)
    responses = agent._device.store.rows("SELECT count(*) FROM responses")
    for rows, end in ((ROWS, "\n"), (ROWS[::-1], "\n"), (ROWS, "\r\n"), ([f" {each}" for each in ROWS[:1]], "\n")):
        again = given(agent, path, *rows, end=end)
        assert (again.recorded, again.known) == (0, len(rows))
    assert agent._device.store.rows("SELECT count(*) FROM responses") == responses
    grown = given(agent, path, "a new one,loan", *ROWS, ROWS[2])
    assert (grown.recorded, grown.known) == (2, 4)
    learnt = sorted((each.text, each.label) for each in agent._device.examples())
    assert learnt == sorted(
        [("my card is gone", "card-lost"), ("I need\na loan", "loan"), ("a new one", "loan"), *[("where is it?", "transfer")] * 3]
    )


def test_the_same_message_has_another_id_on_another_device(
    agent: Agent, deployment: Classified, tmp_path: Path, path: Path
) -> None:
    given(agent, path, ROWS[0])
    with Agent.enrol(deployment.folder, tmp_path / "other", key_from="file", masker=DigitMasker()) as other:
        given(other, path, ROWS[0])
        ids = {each._device.store.rows("SELECT feedback_id FROM feedback")[0][0] for each in (agent, other)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("row", "line", "reason"),
    [
        ("too,many,cells", 4, "wrong number of columns"),
        ("my loan,mortgage", 4, "not one of the model's 3 labels"),
        (",loan", 4, "empty text"),
    ],
)
def test_a_row_that_cannot_be_used_refuses_the_file_with_its_line_before_anything_is_recorded(
    agent: Agent, path: Path, row: str, line: int, reason: str
) -> None:
    with pytest.raises(UsageError) as error:
        given(agent, path, ROWS[1], row, ROWS[0])
    assert f"line {line}: " in error.value.message
    assert reason in error.value.message
    assert counted(agent) == 0
    found = given(agent, path, ROWS[1], row, ROWS[0], skip_bad=True)
    assert (found.recorded, list(found.skipped.values())) == (2, [1])
    assert reason in next(iter(found.skipped))

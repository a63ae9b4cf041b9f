"""Feedback from files: a message counts once, whatever the file looks like, and nothing is recorded of a file that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from clients.classified import Classified, enrol
from fedloop_clients import Agent
from fedloop_clients.feedback import MAX_TEXT_CHARS, Response
from fedloop_clients.importing import Imported, take_in
from fedloop_events.errors import UsageError
from fedloop_tasks.classification.task import Classification
from fedloop_tasks.task import Message, Messages
from row_files import FORMATS

pytestmark = pytest.mark.slow

ROWS = ["my card is gone,card-lost", '"I need\na loan",loan', "where is it?,transfer", "where is it?,transfer"]
PAIRS = [("my card is gone", "card-lost"), ("I need\na loan", "loan"), *[("where is it?", "transfer")] * 2]


@pytest.fixture
def agent(classified: Classified, store_dir: Path) -> Iterator[Agent]:
    with enrol(classified, store_dir) as agent:
        yield agent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.csv"


def given(agent: Agent, path: Path, *rows: str, end: str = "\n", skip_bad: bool = False) -> Imported:
    """What becomes of a file of these rows."""
    text = "\n".join(["text,label", *rows, ""])
    path.write_bytes(text.replace("\n", end).encode())
    return take_in(agent, Classification.read(path), skip_bad=skip_bad)


def learnt(agent: Agent) -> list[tuple[str, str]]:
    return sorted((each.text, each.label) for each in agent._device.examples())


def responses(agent: Agent) -> int:
    ((count,),) = agent._device.store.rows("SELECT count(*) FROM responses")
    assert isinstance(count, int)
    return count


def test_a_file_that_grew_was_reordered_or_has_other_line_ends_counts_each_message_once(agent: Agent, path: Path) -> None:
    first = given(agent, path, *ROWS)
    assert (first.recorded, first.known) == (4, 0)
    made = responses(agent)
    for rows, end in ((ROWS, "\n"), (ROWS[::-1], "\n"), (ROWS, "\r\n"), ([f" {each}" for each in ROWS[:1]], "\n")):
        again = given(agent, path, *rows, end=end)
        assert (again.recorded, again.known) == (0, len(rows))
    assert responses(agent) == made
    grown = given(agent, path, "a new one,loan", *ROWS, ROWS[2])
    assert (grown.recorded, grown.known) == (2, 4)
    assert learnt(agent) == sorted([*PAIRS, PAIRS[3], ("a new one", "loan")])


def test_the_same_messages_count_once_in_whatever_formats_they_come(agent: Agent, path: Path) -> None:
    counts = []
    for write in FORMATS.values():
        path.write_bytes(write(PAIRS))
        found = take_in(agent, Classification.read(path))
        counts.append((found.recorded, found.known))
    assert counts == [(4, 0), *[(0, 4)] * (len(FORMATS) - 1)]
    assert learnt(agent) == sorted(PAIRS)


def test_the_same_text_with_another_label_is_another_message(agent: Agent, path: Path) -> None:
    given(agent, path, "it is gone,card-lost")
    again = given(agent, path, "it is gone,loan", "it is gone,card-lost")
    assert (again.recorded, again.known) == (1, 1)
    assert learnt(agent) == [("it is gone", "card-lost"), ("it is gone", "loan")]


def test_what_the_model_answered_rightly_is_counted(agent: Agent, path: Path) -> None:
    assert given(agent, path, "my card is lost,card-lost", "can I have a loan please,loan", "my card is lost,transfer").right == 2


def test_two_processes_that_take_in_the_same_file_count_each_message_once(
    agent: Agent, classified: Classified, store_dir: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(FORMATS["csv"](PAIRS))
    messages, predict, others = Classification.read(path), agent.predict, list[Imported]()
    with enrol(classified, store_dir) as other:

        def overtaken(text: str) -> Response:
            others.append(take_in(other, messages))
            return predict(text)

        monkeypatch.setattr(agent, "predict", overtaken)
        found = take_in(agent, messages)
    assert (found.recorded, found.known) == (0, 4)
    assert (others[0].recorded, others[0].known) == (4, 0)
    assert learnt(agent) == sorted(PAIRS)


def test_a_text_that_the_device_refuses_refuses_the_file_whatever_its_reader_let_pass(agent: Agent, path: Path) -> None:
    for text in ("half \ud83d", "x" * (MAX_TEXT_CHARS + 1), "\u200b"):
        with pytest.raises(UsageError, match="line 3: text "):
            take_in(agent, Messages(path, [Message(*PAIRS[0]), Message(text, "loan")], [2, 3]))
    assert learnt(agent) == []


def test_the_same_message_has_another_id_on_another_device(
    agent: Agent, classified: Classified, tmp_path: Path, path: Path
) -> None:
    given(agent, path, ROWS[0])
    with enrol(classified, tmp_path / "other") as other:
        assert given(other, path, ROWS[0]).recorded == 1
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
        given(agent, path, ROWS[1], row, ROWS[0], "another,")
    assert f"line {line}: " in error.value.message
    assert reason in error.value.message
    assert "2 of its rows" in error.value.cause
    assert (responses(agent), learnt(agent)) == (0, [])
    found = given(agent, path, ROWS[1], row, ROWS[0], skip_bad=True)
    assert (found.recorded, list(found.skipped.values())) == (2, [1])
    assert reason in next(iter(found.skipped))


@pytest.mark.parametrize(
    ("kind", "place"), [("csv", "line 4"), ("JSON Lines", "line 3"), ("JSON array", "line 10"), ("Parquet", "row 3")]
)
def test_a_label_that_the_model_does_not_have_is_refused_with_its_place(agent: Agent, path: Path, kind: str, place: str) -> None:
    path.write_bytes(FORMATS[kind]([PAIRS[0], PAIRS[2], ("my loan", "mortgage")]))
    with pytest.raises(UsageError, match=f"{place}: "):
        take_in(agent, Classification.read(path))

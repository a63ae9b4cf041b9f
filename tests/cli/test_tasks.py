"""The task of a deployment is the operator's choice: a second one needs nothing outside its own module and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clients.conftest import Deployment
from fedloop_cli.main import run
from fedloop_tasks.table import TASKS

from .notes_task import NAME, WORD, Notes

NOTES = [("the first", "the better first"), ("the second", "the better second")]


class Line:
    """The command line, where there is a second task, and a file of notes."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.bank, self.store, self.book, self._capsys = folder / "bank", folder / "store", folder / "book", capsys
        self.book.write_text("".join(json.dumps({"note": text, "better": better}) + "\n" for text, better in NOTES))
        self.init = ("server", "init", self.bank, "--held-out-as-is", "--no-dp")
        self.made = (*self.init, "--task", NAME, "--book", self.book)

    def call(self, *arguments: str | Path) -> tuple[int, str]:
        """A command's exit status, and what it prints."""
        self._capsys.readouterr()
        status = run([*map(str, arguments)])
        return status, self._capsys.readouterr().out

    def does(self, *arguments: str | Path) -> dict[str, Any]:
        status, text = self.call(*arguments, "--json")
        assert status == 0, text
        found: dict[str, Any] = json.loads(text)
        return found

    def refuses(self, *arguments: str | Path) -> str:
        """What is wrong with a wrong call, and what its hint is."""
        status, text = self.call(*arguments, "--json")
        error = json.loads(text)["error"]
        assert (status, error["cause"]) == (2, "")
        return f"{error['message']} ({error['hint']})"

    def feedback(self, *arguments: str | Path) -> dict[str, Any]:
        return self.does("agent", "feedback", "--store", self.store, *arguments)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    monkeypatch.setitem(TASKS, NAME, Notes)
    return Line(tmp_path, capsys)


def test_a_deployment_of_a_second_task_is_made_and_fed_as_that_task_says(line: Line) -> None:
    assert line.does(*line.made)["layers"] == 1
    settings = (line.bank / "server" / "server.toml").read_text()
    assert "pages = 3\n" in settings
    assert 'epsilon = "none"\n' in settings
    assert "sums_share" not in settings
    line.does("agent", "enrol", line.bank, "--store", line.store, "--key-from", "file", "--no-dp")
    one, two = (line.does("agent", "predict", "--store", line.store, "--text", "a") for _ in range(2))
    assert one["label"] == WORD
    line.feedback("--response", one["response_id"], "--preferred-over", two["response_id"])
    line.feedback("--text", "c", "--predicted", WORD, "--correction", "more")
    assert line.feedback("--data", line.book)["recorded"] == 2
    assert line.feedback("--data", line.book, "--note-key", "note")["known"] == 2
    line.does("agent", "run", "--store", line.store, "--until-settled")
    status = line.does("agent", "status", "--store", line.store)
    assert (status["published"], status["examples"]) == (4, 3)


def test_a_device_refuses_the_options_of_another_task_before_it_records_anything(line: Line) -> None:
    line.does(*line.made)
    line.does("agent", "enrol", line.bank, "--store", line.store, "--key-from", "file", "--no-dp")
    feedback = ("agent", "feedback", "--store", line.store)
    wrong = "--label is an option of the task classification, and this deployment's task is chat"
    hint = "chat takes --preferred-over, --note-key"
    assert line.refuses(*feedback, "--text", "a", "--label", "x") == f"{wrong} ({hint})"
    assert (
        line.refuses(*feedback, "--data", line.book, "--label-column", "x")
        == f"{wrong.replace('label', 'label-column')} ({hint})"
    )
    assert line.does("agent", "status", "--store", line.store)["waiting"] == 0


def test_a_device_that_knows_no_model_yet_reads_no_file_and_takes_no_tasks_options(line: Line, tmp_path: Path) -> None:
    Deployment(tmp_path / "empty").log.close()
    line.does("agent", "enrol", tmp_path / "empty", "--store", line.store, "--key-from", "file")
    feedback = ("agent", "feedback", "--store", line.store)
    said = "no release of model 'default' is known to this device (connect this device to the log once: `fedloop agent run`)"
    assert line.refuses(*feedback, "--data", "no file") == said
    assert line.refuses(*feedback, "--response", "x", "--label", "x") == said


def test_the_settings_of_another_task_are_unknown_keys(line: Line) -> None:
    line.does(*line.made)
    settings = line.bank / "server" / "server.toml"
    settings.write_text(settings.read_text() + "sums_share = 0.5\n")
    assert line.refuses("round", "list", line.bank).startswith('"sums_share" is no key of the server\'s configuration')


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "chta"], 'there is no task "chta"; did you mean "chat"? (choose one of classification, chat)'),
        (["--task", "notes"], 'there is no task "notes" (choose one of classification, chat)'),
        (["--task", "chat"], "the task chat needs --book FILE (The notes to measure with.)"),
        ([], "the task classification needs --test FILE (Held-out messages: "),
        (
            ["--task", "chat", "--book", "b", "--test", "t"],
            "--test is an option of the task classification, and this deployment's task is chat (chat takes --book, ",
        ),
        (["--task", "chat", "--book", "b", "--pages", "two"], "--pages 'two' is not a whole number (How many there are.)"),
        (["--test", "t", "--book", "b"], "--book is an option of the task chat, and this deployment's task is classification ("),
    ],
)
def test_a_call_that_does_not_fit_the_task_is_one_clear_sentence(line: Line, arguments: list[str], said: str) -> None:
    assert line.refuses(*line.init, *arguments).startswith(said)
    assert not line.bank.exists()


def test_the_demo_has_the_same_choice(line: Line) -> None:
    assert line.refuses("demo", "--task", "chta").startswith('there is no task "chta"; did you mean "chat"?')
    wrong = line.refuses("demo", "--data", line.book, "--test", line.book, "--note-key", "x")
    assert wrong.startswith("--note-key is an option of the task chat, and this deployment's task is classification")
    status, _ = line.call("demo", "--task", NAME, "--data", line.book, "--test", line.book, "--note-key", "x")
    assert status == 2


def test_the_help_lists_every_tasks_options_and_says_whose_they_are(line: Line) -> None:
    status, text = line.call("server", "init", "--help")
    listed = " ".join(text.split())
    assert status == 0
    assert "--task NAME What the model learns: classification or chat. [default: classification]" in listed
    assert "--book FILE For chat: The notes to measure with. [required]" in listed
    assert "--data FILE|BOOK For classification: Take the labels from" in listed
    assert "its texts are not kept. For chat: More notes." in listed
    assert "--note-key NAME For chat: " in listed
    assert "--task" not in line.call("agent", "feedback", "--help")[1]


def test_a_configuration_file_may_name_the_task_and_its_options(line: Line, tmp_path: Path) -> None:
    config = tmp_path / "fedloop.toml"
    config.write_text(f'[server.init]\ntask = "chat"\nbook = "{line.book}"\nnote-key = "text"\npages = 2\n')
    assert f"{line.book} has no text" in line.refuses(*line.init, "--config", config)
    assert line.does(*line.init, "--config", config, "--note-key", "note")["layers"] == 1

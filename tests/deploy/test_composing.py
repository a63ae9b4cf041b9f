"""`fedloop init compose`: what it makes, that it makes it once, and that nobody else can read it."""

from __future__ import annotations

import json
import ssl
import stat
import threading
from pathlib import Path

import compose_run
import pytest
from fedloop_cli import main
from fedloop_cli.provisioning import composing
from fedloop_events.errors import UsageError
from fedloop_events.logs.kafka.settings import KafkaSettings


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_values(folder: Path) -> list[str]:
    chosen = json.loads((folder / "secrets" / "chosen.json").read_bytes())
    return [chosen["grafana"], *chosen["kafka"].values(), *(key for pair in chosen["s3"].values() for key in pair)]


def test_only_its_owner_can_read_what_is_secret(tmp_path: Path) -> None:
    made = composing.compose(tmp_path)
    assert stat.S_IMODE(made.secrets.stat().st_mode) == 0o700
    for path in [made.env_file, *made.secrets.rglob("*")]:
        # (certificates are for everybody, within a folder that is not)
        assert path.is_dir() or path.suffix == ".pem" or stat.S_IMODE(path.stat().st_mode) == 0o600
    passwords = random_values(tmp_path)
    assert len(set(passwords)) == len(passwords) == 1 + 5 + 10
    assert all(len(each) >= 20 for each in passwords)


def test_made_again_it_replaces_nothing_and_makes_what_is_missing_as_it_was(tmp_path: Path) -> None:
    composing.compose(tmp_path)
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
    assert sorted(composing.compose(tmp_path).made) == sorted(lost)
    after = contents(tmp_path)
    assert after.pop("secrets/agent-1/s3.credentials") == b"the operator's own"
    del before["secrets/agent-1/s3.credentials"]
    assert after == before
    assert composing.compose(tmp_path).made == []


def test_two_folders_share_no_secret(tmp_path: Path) -> None:
    first, second = (contents(composing.compose(tmp_path / name).secrets) for name in ("a", "b"))
    assert not {data for name, data in first.items() if name.startswith("ca/")} & set(second.values())
    assert first["chosen.json"] != second["chosen.json"]


def test_what_stands_in_env_already_stays(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TORCH_INDEX=mine\nFEDLOOP_DEMO='/elsewhere'")
    made = composing.compose(tmp_path)
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
    kept = composing.compose(tmp_path).secrets
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
    kept = composing.compose(tmp_path).secrets
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


@pytest.mark.parametrize("content", [b"", b"{}", b'{"cluster_id": 1}'])
def test_a_file_of_secrets_that_is_damaged_is_an_error_and_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "chosen.json").write_bytes(content)
    with pytest.raises(UsageError, match="chosen"):
        composing.compose(tmp_path)
    assert (tmp_path / "secrets" / "chosen.json").read_bytes() == content


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used"):
        composing.compose(tmp_path / "file")
    with pytest.raises(UsageError, match="quotation mark"):
        composing.compose(tmp_path / "it's")

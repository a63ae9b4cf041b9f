"""Making a deployment: whole, resumable, and never over something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from devices import CONFIG, SPEC, initial_arrays
from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import decode
from fedloop_events.errors import FedloopError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server import config as configuration
from fedloop_server.deployment import create_deployment, open_deployment, read_config
from msgspec.structs import replace


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def check_whole(folder: Path) -> None:
    deployment = open_deployment(folder)
    payloads = [decode(record) for record in read_all(deployment.log)]
    assert [type(each) for each in payloads] == [
        types.DeploymentCreated,
        types.ModelRegistered,
        types.ReleaseProposed,
        types.ReleasePublished,
    ]
    identities = Identities()
    reader = Reader(deployment.log, ReleasesView(), identities=identities)
    reader.catch_up()
    assert (reader.refused, identities.server_key) == (0, deployment.writer.key.public_key)
    current = reader.fold.current("default")
    assert current is not None
    assert (current.number, deployment.blobs.exists(current.blob)) == (0, True)
    assert deployment.config == CONFIG


def test_a_deployment_is_made_in_a_new_or_empty_folder_and_its_server_part_is_private(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "deep" / "down"):
        create_deployment(folder, SPEC, initial_arrays(), CONFIG)
        check_whole(folder)
        assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / "server").iterdir()} == {0o600}
        assert stat.S_IMODE((folder / "log.sqlite").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "server").stat().st_mode) == 0o700


def test_made_again_it_stays_as_it_is_and_keeps_what_the_operator_changed(tmp_path: Path) -> None:
    first = create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    (tmp_path / "server" / "server.toml").write_text(configuration.dump(replace(CONFIG, quorum=1)))
    second = create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    assert second.writer.key.public_key == first.writer.key.public_key
    assert second.config.quorum == 1
    assert len(list(read_all(second.log))) == 4


STEPS = {False: 16, True: 18}


@pytest.mark.parametrize(("elsewhere", "calls"), [(each, calls + 1) for each, most in STEPS.items() for calls in range(most)])
def test_killed_at_any_step_it_is_made_whole_the_second_time(
    tmp_path: Path, elsewhere: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps: each file that appears (before and after), the blob, the events."""
    left = calls
    place = DeploymentLocation(str(tmp_path / "log"), str(tmp_path / "blobs")) if elsewhere else None

    def dying(function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            result = function(*args, **kwargs)  # type: ignore[operator]
            left -= 1
            if left == 0:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", dying(os.link))
        patched.setattr(BlobStore, "put", dying(BlobStore.put))
        patched.setattr(SqliteLog, "append", dying(SqliteLog.append))
        with pytest.raises(Killed):
            create_deployment(tmp_path / "d", SPEC, initial_arrays(), CONFIG, place)
    create_deployment(tmp_path / "d", SPEC, initial_arrays(), CONFIG, place)
    check_whole(tmp_path / "d")
    assert (tmp_path / "d" / "log.sqlite").exists() != elsewhere


def test_on_kafka_it_is_made_once_and_its_folder_remembers_where(tmp_path: Path, kafka_url: str) -> None:
    place = DeploymentLocation(kafka_url, str(tmp_path / "d" / "blobs"))
    for _ in range(2):
        create_deployment(tmp_path / "d", SPEC, initial_arrays(), CONFIG, place).log.close()
        check_whole(tmp_path / "d")
    with pytest.raises(UsageError, match="another folder"):
        create_deployment(
            tmp_path / "e", SPEC, initial_arrays(), CONFIG, DeploymentLocation(kafka_url, str(tmp_path / "e" / "blobs"))
        )
    assert not (tmp_path / "e").exists()


def test_a_log_has_one_deployment_and_a_deployment_one_log(tmp_path: Path) -> None:
    logs = [DeploymentLocation(str(tmp_path / name), str(tmp_path / "blobs")) for name in ("log", "other")]
    create_deployment(tmp_path / "d", SPEC, initial_arrays(), CONFIG, logs[0]).log.close()
    with pytest.raises(UsageError, match="holds a deployment already"):
        create_deployment(tmp_path / "e", SPEC, initial_arrays(), CONFIG, logs[0])
    with pytest.raises(UsageError, match="are elsewhere"):
        create_deployment(tmp_path / "d", SPEC, initial_arrays(), CONFIG, logs[1])
    create_deployment(tmp_path / "f", SPEC, initial_arrays(), CONFIG, replace(logs[1], log=str(tmp_path / "third"))).log.close()
    with pytest.raises(UsageError, match="is not the one of the deployment"):
        open_deployment(tmp_path / "d", replace(logs[1], log=str(tmp_path / "third")))
    with pytest.raises(UsageError, match="nothing says where the blobs"):
        create_deployment(tmp_path / "g", SPEC, initial_arrays(), CONFIG, DeploymentLocation("kafka://127.0.0.1:1/x", None))


def test_it_is_not_made_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="no folder"):
        create_deployment(tmp_path / "thesis.txt", SPEC, initial_arrays(), CONFIG)


def test_another_model_or_other_tensors_are_refused(tmp_path: Path) -> None:
    create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    with pytest.raises(UsageError, match="another model"):
        create_deployment(tmp_path, replace(SPEC, alpha=2.0), initial_arrays(), CONFIG)
    with pytest.raises(UsageError, match="another model"):
        create_deployment(tmp_path, SPEC, initial_arrays() | {"head.bias": np.ones(3, np.float32)}, CONFIG)


@pytest.mark.parametrize(
    "arrays",
    [
        {"head.bias": np.zeros(4, np.float32)},
        {"head.bias": np.zeros(3, np.float64)},
        {"head.weight": np.full((3, 4), np.nan, np.float32)},
        {"head.more": np.zeros(3, np.float32)},
        {"lora.0.query.A": np.zeros((2, 4), np.int64)},
    ],
    ids=["labels", "float64", "nan", "names", "int64"],
)
def test_tensors_that_can_be_no_release_are_refused_before_anything_is_written(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    with pytest.raises(UsageError):
        create_deployment(tmp_path / "d", SPEC, initial_arrays() | arrays, CONFIG)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("spec", [replace(SPEC, labels=["a", "a", "b"]), replace(SPEC, rank=0), replace(SPEC, base_sha256="x")])
def test_a_model_that_the_log_could_not_hold_is_refused_before_anything_is_written(tmp_path: Path, spec: types.Spec) -> None:
    with pytest.raises(FedloopError):
        create_deployment(tmp_path / "d", spec, initial_arrays(), CONFIG)
    assert not (tmp_path / "d").exists()


def test_without_a_deployment_or_its_key_nothing_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_deployment(tmp_path)
    create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    (tmp_path / "server" / "key.pem").unlink()
    with pytest.raises(UsageError, match="server's key"):
        open_deployment(tmp_path)


def test_a_damaged_file_of_what_the_folder_is_to_become_is_one_clear_sentence(tmp_path: Path) -> None:
    create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    (tmp_path / "server" / "deployment.json").write_text('{"origin": 1}')
    with pytest.raises(UsageError, match=r"deployment\.json does not say what the deployment is"):
        open_deployment(tmp_path)
    with pytest.raises(UsageError, match=r"deployment\.json does not say what the deployment is"):
        create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)


def test_a_folder_that_has_lost_what_it_was_to_become_is_taken_for_no_tasks_deployment(tmp_path: Path) -> None:
    create_deployment(tmp_path, SPEC, initial_arrays(), CONFIG)
    (tmp_path / "server" / "deployment.json").unlink()
    for read in (open_deployment, read_config):
        with pytest.raises(UsageError, match=r"deployment\.json does not say what the deployment is"):
            read(tmp_path)

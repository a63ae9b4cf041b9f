"""Locations: what they may say, what outweighs what, and that no secret in one is ever shown."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fedloop_events import locations
from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation, locate

KAFKA = "kafka://one:9093,two:9093/bank"


def write(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / locations.PLACE_FILE).write_text(text)
    return directory


def test_a_folder_holds_its_own_log_and_blobs_unless_it_says_otherwise(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert locate(plain) == locate(None, plain) == DeploymentLocation(str(plain), str(plain / "blobs"))
    there = write(tmp_path / "there", f'log = "{KAFKA}"\nblobs = "kept"\n')
    assert locate(there) == locate(None, str(there)) == DeploymentLocation(KAFKA, str(there / "kept"))
    only = write(tmp_path / "only", 'blobs = "s3://bucket/bank"\n')
    assert locate(only) == DeploymentLocation(str(only), "s3://bucket/bank")


def test_what_is_given_outweighs_the_folders_file_one_by_one(tmp_path: Path) -> None:
    there = write(tmp_path / "there", f'log = "{KAFKA}"\nblobs = "s3://bucket/bank"\n')
    assert locate(there, "kafka://three:9093") == DeploymentLocation("kafka://three:9093", "s3://bucket/bank")
    assert locate(there, None, "/elsewhere") == DeploymentLocation(KAFKA, "/elsewhere")
    assert locate(there, "https://gate") == DeploymentLocation("https://gate", "https://gate")


def test_blobs_go_with_the_gateway_and_kafka_has_none(tmp_path: Path) -> None:
    assert locate(None, "https://gate:8443") == DeploymentLocation("https://gate:8443", "https://gate:8443")
    assert locate(None, KAFKA) == DeploymentLocation(KAFKA, None)
    with pytest.raises(UsageError, match="nothing says where the blobs are"):
        locations.open_blobs(locate(None, KAFKA).blobs)


def test_a_folder_with_a_log_of_its_own_is_not_another_log_as_well(tmp_path: Path) -> None:
    locations.open_log(tmp_path, create=True).close()
    assert locate(tmp_path, str(tmp_path)).log == str(tmp_path)
    with pytest.raises(UsageError, match="a log of its own"):
        locate(tmp_path, KAFKA)
    assert locate(tmp_path, "https://gate").log == "https://gate"  # which may stand before it


def test_files_that_a_location_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(None, f"{KAFKA}?config=my%20client").log == f"{KAFKA}?config={tmp_path}/my%20client"
    assert locate(None, "https://gate?ca=ca.pem").blobs == f"https://gate?ca={tmp_path}/ca.pem"


def test_a_folder_that_remembers_a_place_names_it_also_after_it_was_moved(tmp_path: Path) -> None:
    for place in (
        DeploymentLocation(KAFKA, str(tmp_path / "here" / "blobs")),
        DeploymentLocation(KAFKA, "s3://bucket/a-b"),
        DeploymentLocation(str(tmp_path / "here"), str(tmp_path / 'odd "folder" \\')),
    ):
        here = write(tmp_path / "here", locations.remembered(tmp_path / "here", place))
        assert locate(here) == place
    assert locations.remembered(here, locate(tmp_path / "here")) == (here / locations.PLACE_FILE).read_text()
    write(here, locations.remembered(here, DeploymentLocation(KAFKA, str(here / "blobs"))))
    moved = here.rename(tmp_path / "moved")
    assert locate(moved) == DeploymentLocation(KAFKA, str(moved / "blobs"))
    assert locations.remembered(moved, DeploymentLocation(str(moved), str(moved / "blobs"))) == ""


@pytest.mark.parametrize(
    "location",
    [
        "kafka://me:hunter2@one:9092/bank",
        "kafka://one:9092/bank?sasl.password=hunter2",
        "kafka://one:9092/bank?config=a&sasl.password=hunter2",
        "kafka://one:9092/bank#hunter2",
        "kafka://one:9092/ban k-hunter2",
        "https://me:hunter2@gate",
        "https://gate?token=hunter2",
        "http://localhost?ca=hunter2",
        "s3://key:hunter2@bucket",
        "ftp://hunter2/x",
    ],
)
def test_a_malformed_log_or_one_with_a_secret_is_refused_and_not_shown(location: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(None, location)
    assert "hunter2" not in f"{caught.value.message} {caught.value.cause} {caught.value.hint}"


@pytest.mark.parametrize(
    "location",
    [
        "s3://key:hunter2@bucket/x",
        "s3://bucket/x?key=hunter2",
        "kafka://hunter2:9092",
        "reference::hunter2",
        "s3://a::file://hunter2",
        "https://me:hunter2@gate",
    ],
)
def test_the_same_of_blobs(location: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(None, KAFKA, location)
    assert "hunter2" not in f"{caught.value.message} {caught.value.cause} {caught.value.hint}"


@pytest.mark.parametrize("text", ["log = 3", "bolbs = 'x'", "log = ", "[log]"])
def test_a_folders_file_is_read_strictly(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"deployment\.toml cannot be read"):
        locate(write(tmp_path / "there", text))


def test_nothing_named_is_an_error_that_says_what_to_name() -> None:
    with pytest.raises(UsageError) as caught:
        locate(None)
    assert "--log" in caught.value.hint


@pytest.mark.parametrize(
    ("location", "module", "extra", "open_it"),
    [
        (KAFKA, "confluent_kafka", "kafka", locations.open_log),
        ("https://gate", "httpx", "gateway", locations.open_log),
        ("s3://bucket", "s3fs", "s3", locations.open_blobs),
    ],
)
def test_an_absent_extra_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, location: str, module: str, extra: str, open_it: Callable[[str], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert importlib.util.find_spec(module) is None
    with pytest.raises(UsageError, match=module) as caught:
        open_it(location)
    assert caught.value.hint == f"pip install 'fedloop[{extra}]'"


def test_a_gateway_makes_no_log() -> None:
    with pytest.raises(UsageError, match="there already"):
        locations.open_log("https://gate", create=True)

"""`fedloop feedback lake`: syncing and asking, in a folder and in S3."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import lake_logs
import pytest
from s3_store import s3_store

from .conftest import Fedloop

COUNT = "SELECT use_case, count(*) AS n FROM feedback WHERE day >= DATE '2020-01-01' GROUP BY use_case ORDER BY use_case"


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    lake_logs.make(tmp_path / "deployment", lake_logs.history(12)).close()
    return tmp_path / "deployment"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place in an S3 store that the environment names; gives its URL."""
    with s3_store(monkeypatch, "lakes"):
        yield "s3://lakes/bank"


def test_a_sync_says_what_it_did_to_each_table_and_a_second_one_that_there_is_nothing(fedloop: Fedloop, deployment: Path) -> None:
    found = fedloop("feedback", "lake", "sync", deployment, "--json").document
    assert found["lake"] == str(deployment / "lake")
    assert found["tables"]["feedback"] == {"added": 10, "removed": 0, "refused": 0}
    assert found["added"] == sum(each["added"] for each in found["tables"].values())
    again = fedloop("feedback", "lake", "sync", deployment)
    assert again.status == 0
    assert "nothing new" in again.out


def test_a_query_is_answered_as_a_table_as_json_and_as_csv(fedloop: Fedloop, deployment: Path) -> None:
    fedloop("feedback", "lake", "sync", deployment)
    document = fedloop("feedback", "lake", "query", deployment, COUNT, "--json").document
    assert document["columns"] == ["use_case", "n"]
    assert [row[0] for row in document["rows"]] == sorted(lake_logs.USE_CASES)
    as_csv = list(csv.reader(io.StringIO(fedloop("feedback", "lake", "query", deployment, COUNT, "--csv").out)))
    assert as_csv == [document["columns"], *([name, str(count)] for name, count in document["rows"])]
    shown = fedloop("feedback", "lake", "query", deployment, COUNT).out.splitlines()
    assert [line.split() for line in shown] == as_csv


def test_what_cannot_be_asked_is_one_clear_error(fedloop: Fedloop, deployment: Path) -> None:
    nowhere = fedloop("feedback", "lake", "query", deployment, "SELECT 1")
    assert nowhere.status == 2
    assert "there is no lake in" in nowhere.err
    fedloop("feedback", "lake", "sync", deployment)
    wrong = fedloop("feedback", "lake", "query", deployment, "SELECT nothing FROM feedback")
    assert wrong.status == 2
    assert "nothing" in wrong.err
    assert "DESCRIBE feedback" in wrong.err
    assert "hint" in fedloop("feedback", "lake", "sync", deployment, "--lake", "gs://bucket").err


def test_a_lake_in_s3_is_written_asked_and_emptied_of_what_is_withdrawn(
    fedloop: Fedloop, deployment: Path, s3: str, tmp_path: Path
) -> None:
    found = fedloop("feedback", "lake", "sync", deployment, "--lake", s3, "--json")
    assert found.status == 0, found.err
    fedloop("feedback", "lake", "sync", deployment, "--lake", tmp_path / "lake")
    assert lake_logs.rows(s3) == lake_logs.rows(tmp_path / "lake")
    document = fedloop("feedback", "lake", "query", deployment, COUNT, "--lake", s3, "--json").document
    assert sum(row[1] for row in document["rows"]) == len(lake_logs.rows(s3)["feedback"])
    for path in fsspec.filesystem("s3").find("lakes/bank"):
        assert b"secret words 3" not in fsspec.filesystem("s3").cat(path) or path.endswith(".parquet")
    assert fedloop("feedback", "lake", "sync", deployment, "--lake", s3, "--json").document["added"] == 0


def test_following_takes_in_what_is_appended_until_it_is_interrupted(deployment: Path) -> None:
    command = [sys.executable, "-m", "fedloop_cli.main", "feedback", "lake", "sync", str(deployment), "--follow", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())["tables"]["feedback"]["added"]
        log = lake_logs.open_again(deployment)
        lake_logs.append(log, [lake_logs.scored(100)])
        assert json.loads(process.stdout.readline())["tables"]["feedback"]["added"] == before + 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        log.close()

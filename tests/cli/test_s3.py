"""Blobs in an S3 store: the command line finds them there, and says so when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fedloop_events.locations import DeploymentLocation
from s3_store import s3_store

from .conftest import Fedloop, deploy


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 store with the bucket `bank`, which the environment names; gives the address."""
    with s3_store(monkeypatch, "bank") as address:
        yield address


def test_a_deployment_keeps_its_blobs_in_s3_and_they_are_checked_there(fedloop: Fedloop, s3: str, tmp_path: Path) -> None:
    directory = tmp_path / "deployment"
    deploy(directory, DeploymentLocation(str(directory), "s3://bank/here")).log.close()
    assert (directory / "deployment.toml").read_text() == 'blobs = "s3://bank/here"\n'
    found = fedloop("log", "verify", directory, "--json").document
    assert (found["verified"], found["blobs"]) == (True, 1)
    swept = fedloop("blobs", "sweep", directory, "--json").document
    assert (swept["blobs"], swept["named"], swept["removed"]) == (1, 1, 0)
    elsewhere = fedloop("log", "verify", directory, "--blobs", "s3://bank/there")
    assert elsewhere.status == 1
    assert "is not in the store" in elsewhere.out
    refused = fedloop("log", "verify", directory, env={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    assert refused.status == 1
    assert "Unable to locate credentials" in refused.out
    assert not (directory / "blobs").exists()

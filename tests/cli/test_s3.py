"""Blobs in an S3 store: the command line finds them there, and says so when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fedloop_events.locations import DeploymentLocation
from moto.server import ThreadedMotoServer

from .conftest import Fedloop, deploy


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 store with the bucket `bank`, which the environment names; gives the address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    variables = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**variables, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bank")
    yield address
    server.stop()


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

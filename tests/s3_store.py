"""An S3 store of the tests' own, which the environment names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[str]:
    """With one bucket, whose name no other test's has: all stores of a process share what they hold. Gives the address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    variables = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**variables, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    store = fsspec.get_filesystem_class("s3")
    store.clear_instance_cache()  # fsspec keeps an instance, and with it the address of another test's store
    store(skip_instance_cache=True).mkdir(bucket)
    yield address
    server.stop()
    store.clear_instance_cache()

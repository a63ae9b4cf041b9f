"""The OpenAPI document is complete and true: requests made from it, and broken on purpose, get the answers that it declares."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import samples
import schemathesis
from fedloop_events.logs.http import signing
from fedloop_server.gateway import Limits, describing
from gateway.harness import Served, serving
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

LIMITS = Limits(requests_per_s=1e6, burst=1e6, strangers_per_s=1e6, strangers_burst=1e6, nonces=10**6, longest_wait_s=0.2)
DOCUMENT = describing.document(LIMITS)
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway that is asked as often as it takes."""
    with serving(tmp_path_factory.mktemp("openapi"), "device-1", limits=LIMITS) as served:
        yield served


class Signed(requests.auth.AuthBase):
    """Signs whatever was generated, as a device."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        assert request.url is not None
        parts = urlsplit(request.url)
        body = request.body or b""
        content = body.encode() if isinstance(body, str) else bytes(body) if isinstance(body, bytes | bytearray) else b""
        request.headers.update(
            signing.sign(
                str(request.method),
                parts.netloc,
                parts.path,
                parts.query,
                content_sha256=hashlib.sha256(content).digest(),
                client_id="device-1",
                key=samples.key("device-1"),
                now_s=int(time.time()),
            )
        )
        return request


def _check(case: Any, served: Served, auth: Signed | None) -> None:
    response = case.call(base_url=served.address, verify=str(served.ca), auth=auth)
    case.validate_response(
        response,
        checks=[
            schemathesis.checks.not_a_server_error,
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_headers_conformance,
            checks.response_schema_conformance,
        ],
    )


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_a_device_gets_the_answers_that_are_declared(case: Any, open_to_all: Served) -> None:
    _check(case, open_to_all, Signed())


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_nobody_gets_the_answers_that_are_declared(case: Any, open_to_all: Served) -> None:
    _check(case, open_to_all, None)


def test_the_gateway_serves_its_document(open_to_all: Served) -> None:
    answer = open_to_all.raw("GET", "/openapi.json")
    assert answer.json() == DOCUMENT

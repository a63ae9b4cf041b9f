"""Feedback links: whom they let in, for how long, and what their page does with what people write."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from clients.classified import TEXTS, Classified, enrol
from clients.conftest import DigitMasker
from clients.sidecar_served import KEY, Served, error, serving
from fedloop_clients import Agent
from fedloop_clients.feedback import UnknownResponseError
from fedloop_clients.feedback_links import Link, link_of, token
from fedloop_events.errors import UsageError


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def served(classified: Classified, clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("links") / "store"
    with enrol(classified, store, clock=clock) as agent, serving(agent) as made:
        yield made


@pytest.fixture
def response_id(served: Served) -> str:
    return served.agent.predict(TEXTS["loan"]).response_id


def browser() -> httpx.Client:
    return httpx.Client(trust_env=False)


def test_a_link_takes_feedback_without_the_key(served: Served, response_id: str) -> None:
    before = served.agent.status().waiting
    url = served.agent.feedback_url(response_id)
    assert url.startswith(f"{served.address}/f/")
    with browser() as page:
        shown = page.get(url)
        assert shown.status_code == 200
        assert 'name="thumb"' in shown.text
        taken = page.post(url, data={"thumb": "down", "rating": "2", "correction": "card-lost", "comment": "no"})
        assert "Thank you" in taken.text
    assert served.agent.status().waiting == before + 1


def test_a_link_is_made_over_http_too(served: Served, response_id: str) -> None:
    found = served.http.post("/v1/feedback/links", json={"id": response_id, "ttl_s": 60})
    assert httpx.get(found.json()["url"], trust_env=False).status_code == 200
    assert served.http.post("/v1/feedback/links", json={"id": "none"}).status_code == 404
    refused = served.http.post("/v1/feedback/links", json={"id": response_id, "ttl_s": 1e12})
    assert (refused.status_code, error(refused)["code"]) == (400, "invalid_request")


def test_a_link_takes_feedback_once_and_the_same_again_counts_once(served: Served, response_id: str) -> None:
    url, before = served.agent.feedback_url(response_id), served.agent.status().waiting
    with browser() as page:
        for _ in range(2):
            assert page.post(url, data={"thumb": "up"}).status_code == 200
        again = page.post(url, data={"thumb": "down"})
        assert (again.status_code, "used already" in again.text) == (409, True)
    assert served.agent.status().waiting == before + 1


def test_an_expired_link_is_410_and_takes_nothing(served: Served, clock: Clock, response_id: str) -> None:
    url, before = served.agent.feedback_url(response_id, ttl=60), served.agent.status().waiting
    with browser() as page:
        clock.now += 59
        assert page.get(url).status_code == 200
        clock.now += 1
        for answer in (page.get(url), page.post(url, data={"thumb": "up"})):
            assert (answer.status_code, "has expired" in answer.text) == (410, True)
    assert served.agent.status().waiting == before


def test_a_forged_link_is_403_and_takes_nothing(served: Served, clock: Clock, response_id: str) -> None:
    address, _, right = served.agent.feedback_url(response_id).rpartition("/")
    data, _, mac = right.partition(".")
    longer = token(Link(response_id, int(clock.now) + 10**6), b"another key").partition(".")[0]
    other = "A" if data[5] != "A" else "B"
    forged = [
        f"{longer}.{mac}",
        f"{data[:5]}{other}{data[6:]}.{mac}",
        data,
        f"{data}.",
        f".{mac}",
        "é.é",
        "a" * 5_000,
        f"{right}A",
    ]
    forged.append(token(Link(response_id, int(clock.now) + 60), b"another key"))
    before = served.agent.status().waiting
    with browser() as page:
        assert page.get(f"{address}/{right}").status_code == 200
        for each in forged:
            for answer in (page.get(f"{address}/{each}"), page.post(f"{address}/{each}", data={"thumb": "up"})):
                assert (answer.status_code, "not valid" in answer.text) == (403, True)
    assert served.agent.status().waiting == before


def test_a_link_of_another_device_is_not_valid_here(
    classified: Classified, served: Served, clock: Clock, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Agent.enrol(
        classified.folder, tmp_path_factory.mktemp("other") / "store", key_from="file", masker=DigitMasker(), clock=clock
    ) as other:
        response = other.record("a", "loan")
        with pytest.raises(UsageError, match="no sidecar"):
            other.feedback_url(response.response_id)
        other.links.serve_at(served.address)
        assert httpx.get(other.feedback_url(response.response_id), trust_env=False).status_code == 403


@pytest.mark.parametrize("ttl", [0, -1, 1e9, float("nan"), float("inf")])
def test_a_link_that_cannot_be_meant_is_not_made(served: Served, response_id: str, ttl: float) -> None:
    with pytest.raises(UsageError, match="a link holds for"):
        served.agent.feedback_url(response_id, ttl=ttl)
    with pytest.raises(UnknownResponseError):
        served.agent.feedback_url("none")


def test_what_was_written_comes_back_as_text_where_something_is_wrong(served: Served, response_id: str) -> None:
    hostile = "</textarea><script>alert(1)</script>\"'"
    url = served.agent.feedback_url(response_id)
    with browser() as page:
        for wrong in ({"rating": "9", "comment": hostile}, {"thumb": "<b>", "comment": hostile}):
            answer = page.post(url, data=wrong)
            assert answer.status_code == 400
            assert "<script" not in answer.text
            assert "<b>" not in answer.text
            assert "&lt;/textarea&gt;&lt;script&gt;" in answer.text
        empty = page.post(url, data={"comment": "  "})
        assert (empty.status_code, "The feedback is empty" in empty.text) == (400, True)
        for body in (b"\xff\xfe", b"thumb=%FF", b"&".join([b"thumb=up"] * 50)):
            assert page.post(url, content=body).status_code == 400
        assert page.post(url, data={"thumb": "up", "comment": "a" * 3_000}).text.count("left out") == 1


def test_a_page_runs_nothing_and_holds_no_secret(served: Served, response_id: str) -> None:
    url = served.agent.feedback_url(response_id)
    shown = httpx.get(url, trust_env=False)
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy
    assert shown.headers["referrer-policy"] == "no-referrer"
    assert shown.headers["cache-control"] == "no-store"
    assert not re.search(r"<script|\son[a-z]+=|src=|style=", shown.text)
    secrets = [KEY, TEXTS["loan"], served.agent.identity.signing_key.hex(), served.agent.identity.secret("link").hex()]
    assert not [each for each in secrets if each in shown.text + url]


def test_a_token_reads_as_the_link_that_it_was_made_of() -> None:
    link = Link("a-response", 2_000)
    assert link_of(token(link, b"k"), b"k", 1_999.9) == link

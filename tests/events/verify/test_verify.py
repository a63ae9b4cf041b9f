"""The check of a log by whoever has it: what it reads, and what it says that it has not read."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import LogError, UsageError
from fedloop_events.locations import LOG_FILE, DeploymentLocation, open_log
from fedloop_events.logs.port import EventLog
from fedloop_events.verify.checks import MOST_FINDINGS
from fedloop_events.verify.log import NO_BLOBS, UNSEEN, verify


def never_log() -> EventLog:
    raise AssertionError("the embedded log's file is read as it is")


def never_blobs() -> BlobStore:
    raise AssertionError("there are no blobs to read")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of a deployment with a client that was seen."""
    log = open_log(tmp_path, create=True)
    payloads = samples.created(), samples.enrolled(), samples.seen()
    log.append([samples.signed(payload, "server" if payload is payloads[0] else None) for payload in payloads])
    log.close()
    return tmp_path


def test_an_embedded_log_is_read_as_a_file_and_blobs_only_if_one_is_named(folder: Path) -> None:
    report = verify(DeploymentLocation(str(folder), str(folder / "blobs")), never_log, never_blobs)
    assert (report.verified, report.events, report.by_topic, report.clients) == (True, 3, {"clients": 3}, 1)
    assert report.not_seen == UNSEEN[""]


def test_another_log_is_read_through_its_port_and_says_what_a_gateway_could_hold_back(folder: Path) -> None:
    report = verify(DeploymentLocation("https://gateway", None), lambda: open_log(folder), never_blobs)
    assert (report.verified, report.events, report.clients) == (True, 3, 1)
    assert report.not_seen == NO_BLOBS + UNSEEN["https"]


def test_every_fault_is_counted_and_the_first_ones_are_kept(folder: Path) -> None:
    log = open_log(folder)
    log.append([samples.signed(samples.seen(seq=2), "stranger") for _ in range(MOST_FINDINGS + 5)])
    log.close()
    report = verify(DeploymentLocation(str(folder), None), never_log, never_blobs)
    assert (report.verified, report.wrong, len(report.findings)) == (False, MOST_FINDINGS + 5, MOST_FINDINGS)
    assert {finding.offset for finding in report.findings} == set(range(4, 4 + MOST_FINDINGS))


def test_what_is_absent_or_no_log_is_refused(tmp_path: Path) -> None:
    place = DeploymentLocation(str(tmp_path), None)
    with pytest.raises(UsageError, match="there is no log"):
        verify(place, never_log, never_blobs)
    (tmp_path / LOG_FILE).write_bytes(b"x" * 5000)
    with pytest.raises(LogError):
        verify(place, never_log, never_blobs)

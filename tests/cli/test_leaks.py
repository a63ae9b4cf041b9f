"""The demo's search for planted values finds them wherever they stand, and does not see what is not there."""

from __future__ import annotations

from pathlib import Path

from fedloop_cli.demo import leaks, users
from fedloop_events import locations
from fedloop_tasks.classification.task import Classification

PLANTED = {("PERSON", "Grace Übermut"), ("CITY", "Ulm"), ("POSTCODE", "10115"), ("IBAN_CODE", "DE89370400440532013000")}


def find(data: bytes, *, binary: bool = False) -> set[leaks.Value]:
    return leaks.Needles(PLANTED, {"grace"}).found_in(data, binary=binary)


def test_a_value_is_found_at_every_alignment() -> None:
    for before in range(9):
        assert find(b"-" * before + b"DE89370400440532013000", binary=True) == {("IBAN_CODE", "DE89370400440532013000")}


def test_a_word_of_a_name_counts_by_itself_unless_it_is_an_ordinary_word() -> None:
    assert find("so said Übermut.".encode()) == {("PERSON", "Übermut")}
    assert find(b"by the Grace of") == set()
    assert find("Grace Übermut".encode()) == {("PERSON", "Grace Übermut"), ("PERSON", "Übermut")}


def test_short_values_count_as_whole_words_in_text_alone() -> None:
    assert find(b'"in 10115 now"') == {("POSTCODE", "10115")}
    assert find(b"4210115") == find(b"101159") == find(b"x10115") == set()
    assert find(b" 10115 ", binary=True) == set()


def test_every_file_and_every_event_is_searched(deployment: Path) -> None:
    log, blobs = locations.open_log(deployment), locations.open_blobs(deployment / "blobs")
    needles = leaks.Needles(PLANTED, ())
    assert leaks.search(deployment, log, blobs, needles) == {}
    (deployment / "server" / "note").write_bytes(b"x" * 5 + b" 10115")
    blob = next(path for path in (deployment / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes() + b"DE89370400440532013000")
    assert set(leaks.search(deployment, log, blobs, needles)) == {("POSTCODE", "10115"), ("IBAN_CODE", "DE89370400440532013000")}


def test_messages_are_spread_unevenly_and_none_is_lost_or_doubled() -> None:
    given = users.invented(Classification, 8, seed=1)
    texts = [message.text for device in given.devices for message in device]
    assert len(texts) == len(set(texts)) >= 1_500
    sizes = sorted(map(len, given.devices))
    assert sizes[0] >= 2
    assert sizes[-1] > 1.3 * sizes[0]
    assert users.invented(Classification, 8, seed=1).devices == given.devices
    assert users.invented(Classification, 8, seed=2).devices != given.devices


def test_most_messages_come_before_the_first_round_and_all_before_the_last() -> None:
    for messages in (2, 3, 10, 301):
        for rounds in (1, 2, 3, 8):
            waves = users.waves(messages, rounds, 0.8)
            assert waves == sorted(waves)
            assert len(waves) == rounds
            assert waves[0] >= messages / 2
            assert waves[-1] == messages

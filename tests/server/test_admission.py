"""What is checked before a reply counts: each way to be wrong has its own stable code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import BlobRef, Content, InstructionSent, Mechanism, RoundOpened, UpdateSubmitted
from fedloop_server.flower.admission import Admission, ExpectedReply, distance, inconsistent
from numpy.typing import NDArray

MECHANISM = Mechanism(sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=10, divisor=32.0)
BASE = {"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
GOOD = {"a": np.full((2, 3), 2, np.float32), "b": np.ones(2, np.float32)}
"""Its distance from the base is sqrt(8)."""
OPENED = RoundOpened(
    origin="o", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="m", base_release="0000-x",
    base=BlobRef("0" * 64, 1), strategy="ffa", cohort=["c"], quorum=1, deadline_s=1.0, upload=["a", "b"],
    max_upload_bytes=1000, max_update_norm=3.0, mechanism=MECHANISM,
)  # fmt: skip
SENT = InstructionSent(
    origin="o", epoch=1, run_id="main", round_id="r0001", step=0, client_id="c", message_type="train", content=Content(),
    content_sha256="0" * 64,
)  # fmt: skip
UPDATE = UpdateSubmitted(
    origin="o", client_id="c", seq=1, run_id="main", instruction_id="1" * 32, content=Content(), round_id="r0001",
    base_release="0000-x", mechanism=MECHANISM, spend_seq=0,
)  # fmt: skip
TERMS = ExpectedReply(tensors.specs(BASE), OPENED, BASE)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def check(blobs: BlobStore, update: UpdateSubmitted, terms: ExpectedReply = TERMS, **admission: Any) -> str | None:
    refusal = Admission(**admission).check(update, SENT, terms, TensorReader(blobs))
    return refusal and refusal.reason


def submitted(blobs: BlobStore, arrays: dict[str, NDArray[Any]] = GOOD, **fields: Any) -> UpdateSubmitted:
    ref = blobs.put(tensors.encode(arrays))
    metrics = fields.pop("metrics", {"num-examples": 1})
    return msgspec.structs.replace(UPDATE, content=Content(arrays={"arrays": ref}, metrics={"metrics": metrics}), **fields)


def test_a_good_update_is_accepted_with_equal_weight(blobs: BlobStore) -> None:
    update = submitted(blobs)
    assert check(blobs, update, ledger_check=lambda *_: None) is None
    assert Admission().weight(update, OPENED) == 1.0
    plain = submitted(blobs, metrics={"num-examples": 7})
    assert Admission().weight(plain, msgspec.structs.replace(OPENED, mechanism=None)) == 7.0
    assert Admission().weight(plain, None) == 7.0


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("not-addressed", {"client_id": "other"}),
        ("wrong-round", {"round_id": "r0002"}),
        ("wrong-round", {"round_id": None}),
        ("wrong-base", {"base_release": "0001-y"}),
        ("wrong-base", {"base_release": None}),
        ("wrong-mechanism", {"mechanism": None}),
        ("wrong-mechanism", {"mechanism": msgspec.structs.replace(MECHANISM, noise_multiplier=0.5)}),
        ("no-spend", {"spend_seq": None}),
        ("wrong-weight", {"metrics": {"num-examples": 12}}),
        ("wrong-weight", {"metrics": {"num-examples": -1}}),
        ("wrong-weight", {"metrics": {"num-examples": [1]}}),
        ("metrics-not-finite", {"metrics": {"num-examples": 1, "loss": float("nan")}}),
        ("metrics-not-finite", {"metrics": {"num-examples": 1, "losses": [0.0, float("inf")]}}),
        ("metrics-not-finite", {"metrics": {"num-examples": 1, "n": 10**400}}),
    ],
)
def test_an_update_against_the_rounds_terms_is_refused(blobs: BlobStore, reason: str, fields: dict[str, Any]) -> None:
    assert check(blobs, submitted(blobs, **fields)) == reason


def test_a_weight_is_bounded_by_the_clients_heartbeat_and_by_the_terms(blobs: BlobStore) -> None:
    opened = msgspec.structs.replace(OPENED, mechanism=None, max_weight=100.0)
    terms = ExpectedReply(TERMS.specs, opened, BASE)

    def reason(weight: float, at_least: int) -> str | None:
        update = submitted(blobs, metrics={"num-examples": weight}, mechanism=None, spend_seq=None)
        return check(blobs, update, terms, examples_at_least=lambda client: at_least)

    assert [reason(weight, 64) for weight in (1, 64, 256, 257, 10**12)] == [None] * 3 + ["implausible-weight"] * 2
    assert [reason(weight, 0) for weight in (1, 4, 5)] == [None, None, "implausible-weight"]
    weights = [Admission().weight(submitted(blobs, metrics={"num-examples": each}, mechanism=None), opened) for each in (7, 256)]
    assert weights == [7.0, 100.0]


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("wrong-tensors", {"a": GOOD["a"].T}),
        ("wrong-tensors", {"a": GOOD["a"].astype(np.float64)}),
        ("wrong-tensors", {"a": np.ones((2, 2), np.float32), "b": np.ones(1, np.float32)}),
        ("wrong-size", {"a": np.ones((200, 300), np.float32)}),
        ("not-finite", {"a": np.full((2, 3), np.nan, np.float32)}),
        ("not-finite", {"b": np.array([np.inf, 0], np.float32)}),
        ("norm", {"a": np.full((2, 3), 1e20, np.float32)}),
        ("norm", {"b": np.array([3.01, 0], np.float32)}),
    ],
)
def test_tensors_against_the_rounds_terms_are_refused(blobs: BlobStore, reason: str, changed: dict[str, Any]) -> None:
    assert check(blobs, submitted(blobs, GOOD | changed)) == reason


def test_the_ledgers_word_counts(blobs: BlobStore) -> None:
    asked: list[object] = []

    def ledger(*arguments: object) -> str | None:
        asked.append(arguments)
        return "unknown-spend"

    assert check(blobs, submitted(blobs), ledger_check=ledger) == "wrong-spend"
    assert asked == [("c", 0, MECHANISM, "1" * 32)]


def raw(header: str, data: bytes = b"") -> list[bytes]:
    return [len(header).to_bytes(8, "little"), header.encode(), data]


HOSTILE: dict[str, Callable[[], list[bytes]]] = {
    "trailing bytes": lambda: [*map(bytes, tensors.encode(GOOD)), b"x"],
    "truncated": lambda: [b"".join(map(bytes, tensors.encode(GOOD)))[:-1]],
    "no header": lambda: [b"\xff" * 200],
    "huge header": lambda: [(2**60).to_bytes(8, "little"), b"{" * 100],
    "duplicate names": lambda: raw(
        '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a":{"dtype":"F32","shape":[2],"data_offsets":[24,32]}}',
        bytes(32),
    ),
    "overlap": lambda: raw(
        '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}',
        bytes(32),
    ),
    "many empty tensors": lambda: raw(
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(900)}), bytes(32)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tensor_file_is_refused(blobs: BlobStore, name: str) -> None:
    ref = blobs.put(HOSTILE[name]())
    opened = msgspec.structs.replace(OPENED, max_upload_bytes=10**6)
    update = msgspec.structs.replace(UPDATE, content=Content(arrays={"arrays": ref}))
    assert check(blobs, update, ExpectedReply(TERMS.specs, opened, BASE)) in ("wrong-tensors", "wrong-size")


def test_the_size_is_checked_before_a_byte_is_fetched(blobs: BlobStore) -> None:
    for size in (0, 31, 10**15):
        ref = BlobRef("0" * 64, size)
        assert check(blobs, msgspec.structs.replace(UPDATE, content=Content(arrays={"arrays": ref}))) == "wrong-size"


def test_an_absent_blob_and_changed_bytes_are_told_apart(blobs: BlobStore, tmp_path: Path) -> None:
    update = submitted(blobs)
    ref = update.content.arrays["arrays"]
    path = tmp_path / ref.sha256[:2] / ref.sha256[2:]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    assert check(blobs, update) == "wrong-bytes"
    path.unlink()
    assert check(blobs, update) == "blob-absent"


def test_replies_without_tensors_hold_none(blobs: BlobStore) -> None:
    plain = msgspec.structs.replace(UPDATE, round_id=None, base_release=None, mechanism=None, spend_seq=None)
    assert check(blobs, plain, ExpectedReply()) is None
    with_arrays = msgspec.structs.replace(plain, content=submitted(blobs).content)
    assert check(blobs, with_arrays, ExpectedReply()) == "wrong-records"
    assert check(blobs, plain, ExpectedReply(TERMS.specs)) == "wrong-records"


def test_no_refusal_repeats_what_the_update_holds(blobs: BlobStore) -> None:
    secret = submitted(blobs, {"a-secret": GOOD["a"], "b": GOOD["b"]})
    refusal = Admission().check(secret, SENT, TERMS, TensorReader(blobs))
    assert refusal is not None
    assert "secret" not in refusal.detail


def test_the_distance_is_measured_in_float64() -> None:
    huge = {"a": np.full(4, 1e20, np.float32)}
    assert distance(huge, None) == pytest.approx(2e20)
    assert distance({"a": np.full(300_000, 3, np.float32)}, {"a": np.ones(300_000, np.float32)}) == pytest.approx(
        2 * np.sqrt(300_000)
    )


def test_the_most_frequent_layout_holds_and_of_equals_the_first() -> None:
    one, other = Content(metrics={"m": {"a": 1}}), Content(metrics={"m": {"b": 1}})
    assert inconsistent([one, other, other]) == {0}
    assert inconsistent([one, other]) == {1}
    assert inconsistent([]) == set()

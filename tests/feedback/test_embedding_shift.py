"""Other texts than before are found by their embeddings, with nothing kept of the texts but means of features."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from fedloop_events.types import DriftDetected
from fedloop_server.feedback import embedding_shift
from fedloop_server.feedback.embedding_shift import ALARM, BATCH, RECENT, REFERENCE, Embedded
from fedloop_server.feedback.operators.drift import Drift, DriftState
from feedback.driving import drive, recorded, scored
from numpy.typing import NDArray

WIDTH = 48
FIRST_LOOK = BATCH * (REFERENCE + RECENT)


def directions(name: str, count: int) -> NDArray[np.float32]:
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(count * WIDTH), "u1").reshape(count, WIDTH)
    return drawn.astype(np.float32) / 127.5 - 1


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Texts of one topic, which is their first word, lie near each other."""
    return np.stack([directions(text.split()[0], 1)[0] + directions(text, 1)[0] for text in texts])


def texts(seed: int, quiet: int, moved: int = 0, share: float = 0.0) -> list[str]:
    """Of ten topics; then a share of an eleventh."""
    source = random.Random(seed)
    topics = [source.randrange(10) for _ in range(quiet)]
    topics += [10 if source.random() < share else source.randrange(10) for _ in range(moved)]
    return [f"topic{topic} {source.random()}" for topic in topics]


def alarms(asked: Sequence[str]) -> list[int]:
    state = Embedded()
    return [n for n, text in enumerate(asked, 1) if embedding_shift.observe(state, text, embed, "support") is not None]


def test_a_new_topic_is_emitted_as_drift_with_the_p_value() -> None:
    asked = texts(1, 1000, 400, 0.5)
    (emitted,) = drive(Drift(embed), [scored(n, text=text) for n, text in enumerate(asked)])
    drift = emitted.emit.payload
    assert isinstance(drift, DriftDetected)
    assert (drift.metric, drift.detectors) == ("embeddings", ["mmd"])
    assert 1000 < drift.seen <= 1300
    assert drift.statistic is not None
    assert 0 < drift.statistic <= ALARM


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_share_of_a_new_topic_is_found_within_its_window(share: float) -> None:
    for seed in range(5):
        found = alarms(texts(seed, 1000, 400, share))
        assert found
        assert 1000 < found[0] <= 1000 + BATCH * (RECENT + 1)


def test_more_of_the_same_topics_is_no_drift() -> None:
    assert sum(bool(alarms(texts(seed, 2000))) for seed in range(10)) == 0


def test_after_a_shift_the_new_texts_are_the_usual_ones() -> None:
    assert len(alarms(texts(2, 1000, 2000, 0.5))) == 1


def test_a_restart_after_any_event_changes_no_emission_and_no_id() -> None:
    payloads = [scored(n, float(n % 3 > 0), text=text) for n, text in enumerate(texts(3, 900, 300, 0.6))]
    uninterrupted = drive(Drift(embed), payloads)
    assert uninterrupted
    for every in (1, 31, 100):
        assert drive(Drift(embed), payloads, restored_after=every) == uninterrupted


def test_texts_are_embedded_in_batches_and_only_then() -> None:
    asked: list[int] = []

    def counting(batch: Sequence[str]) -> NDArray[np.float32]:
        asked.append(len(batch))
        return embed(batch)

    drive(Drift(counting), [scored(n, text=text) for n, text in enumerate(texts(4, 5 * BATCH + 3))])
    assert asked == [BATCH] * 5


def test_without_an_embedding_no_text_is_kept() -> None:
    operator, state = Drift(), DriftState()
    for record, payload in recorded([scored(n, 1.0, text=text) for n, text in enumerate(texts(5, 50))]):
        list(operator.apply(state, record, payload))
    assert state.embeddings == Embedded()


def test_a_state_does_not_grow_with_what_was_taken_in_nor_with_long_texts() -> None:
    state, most = Embedded(), 0
    for text in texts(6, FIRST_LOOK + 20 * BATCH):
        embedding_shift.observe(state, text + "x" * 12_000, embed, "support")
        most = max(most, len(msgspec.msgpack.encode(state)))
    assert most < 64 << 10


def test_vectors_that_are_not_finite_or_zero_are_taken_and_their_length_does_not_matter() -> None:
    vectors = embed(["topic1 a", "topic2 b"])
    assert np.allclose(embedding_shift.features(vectors), embedding_shift.features(1000 * vectors))
    assert np.isfinite(embedding_shift.features(np.array([[np.nan, 1.0], [0.0, 0.0], [np.inf, 1.0]], np.float32))).all()


def test_the_features_are_the_same_for_ever() -> None:
    """States hold means of them: other features are another version of the operator."""
    found = embedding_shift.features(np.eye(3, dtype=np.float32))
    assert [*found[0, :3], found[2, -1]] == pytest.approx([-0.088333, -0.087552, 0.085117, 0.029926], abs=1e-5)


def test_the_features_products_are_the_gaussian_kernel() -> None:
    vectors = embed([f"topic{n} {n}" for n in range(20)])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    squared = ((unit[:, None] - unit[None]) ** 2).sum(axis=2)
    features = embedding_shift.features(vectors)
    assert np.abs(features @ features.T - np.exp(-squared / embedding_shift.SQUARED_WIDTH)).max() < 0.25

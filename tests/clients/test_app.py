"""The LoRA `ClientApp`, called as an agent calls it: an instruction in, a content out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fedloop_clients.app import ARRAYS, METRICS, client_app
from fedloop_clients.capture import Capture
from fedloop_clients.classifier import ClassifierApp
from fedloop_clients.models import Models
from fedloop_clients.store import Store
from fedloop_events import envelope
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.flower.messages import Declined, new_context, serve_instruction
from fedloop_events.types import BlobRef, Content, InstructionSent, Mechanism, RoundOpened
from fedloop_tasks.classification.examples import Example
from fedloop_tasks.classification.model import EmbeddingClassifier, describe
from msgspec import structs

EXAMPLES = [Example("my card has not arrived", "card"), Example("what does a loan cost", "loan")]
MECHANISM = Mechanism(sampling_rate=0.5, noise_multiplier=1.0, clip_norm=1.0, steps=2, divisor=4.0)


@pytest.fixture(scope="module")
def model() -> EmbeddingClassifier:
    return EmbeddingClassifier(describe(["card", "loan"]), device="cpu")


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def base(model: EmbeddingClassifier, blobs: BlobStore) -> BlobRef:
    return blobs.put(tensors.encode(model.initial_arrays(0)))


def terms(model: EmbeddingClassifier, base: BlobRef, mechanism: Mechanism | None) -> RoundOpened:
    return RoundOpened(
        origin="test",
        epoch=0,
        run_id="main",
        round_id="r0001",
        request_id="q",
        number=1,
        model="default",
        base_release="0000-0",
        base=base,
        strategy="ffa",
        cohort=["a"],
        quorum=1,
        deadline_s=60.0,
        upload=[name for name in model.shapes if not name.endswith(".A")],
        max_upload_bytes=1 << 20,
        max_update_norm=1e6,
        mechanism=mechanism,
    )


def serve(
    model: EmbeddingClassifier,
    blobs: BlobStore,
    content: Content,
    opened: RoundOpened | None,
    examples: Sequence[Example] = EXAMPLES,
    message_type: str = "train",
) -> Content | Declined:
    sent = InstructionSent(
        origin="test",
        epoch=0,
        run_id="main",
        step=0,
        client_id="a",
        message_type=message_type,
        content=content,
        content_sha256="0" * 64,
    )
    app = client_app(lambda _: model, lambda _: examples)
    event = envelope.encode(sent, id="0" * 32, time_s=0)
    record = Record(**structs.asdict(event), stream="log", offset=1, appended_ms=0)
    return serve_instruction(app, record, sent, new_context(1, 2), TensorReader(blobs), terms=opened)


@pytest.mark.parametrize("n", [0, 2])
def test_a_private_reply_holds_the_upload_and_a_constant(
    model: EmbeddingClassifier, blobs: BlobStore, base: BlobRef, n: int
) -> None:
    opened = terms(model, base, MECHANISM)
    reply = serve(model, blobs, Content(arrays={ARRAYS: base}), opened, EXAMPLES[:n])
    assert isinstance(reply, Content)
    assert reply.metrics == {METRICS: {"num-examples": 1}}
    assert reply.configs == {}
    assert list(reply.arrays) == [ARRAYS]
    got = tensors.decode(blobs.get(reply.arrays[ARRAYS]))
    assert [(name, value.shape) for name, value in got.items()] == [(name, model.shapes[name]) for name in opened.upload]
    assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}


def test_a_plain_reply_counts_the_examples(model: EmbeddingClassifier, blobs: BlobStore, base: BlobRef) -> None:
    reply = serve(model, blobs, Content(arrays={ARRAYS: base}), terms(model, base, None))
    assert isinstance(reply, Content)
    assert reply.metrics == {METRICS: {"num-examples": 2}}


def test_training_starts_at_the_release_of_the_message_and_leaves_the_model_as_it_was(
    model: EmbeddingClassifier, blobs: BlobStore, base: BlobRef
) -> None:
    mine = {name: np.full(shape, 0.01, np.float32) for name, shape in model.shapes.items()}
    still = structs.replace(terms(model, base, MECHANISM), hyperparameters={"head_lr": 0.0, "lora_lr": 0.0})
    model.load(mine)
    reply = serve(model, blobs, Content(arrays={ARRAYS: base}), still)
    assert isinstance(reply, Content)
    got = tensors.decode(blobs.get(reply.arrays[ARRAYS]))
    assert all(value.tobytes() == model.initial_arrays(0)[name].tobytes() for name, value in got.items())
    assert all(value.tobytes() == mine[name].tobytes() for name, value in model.arrays().items())


def test_what_the_app_cannot_do_is_declined(model: EmbeddingClassifier, blobs: BlobStore, base: BlobRef) -> None:
    good, opened = Content(arrays={ARRAYS: base}), terms(model, base, MECHANISM)
    other = blobs.put(tensors.encode({"head.weight": np.zeros((2, 384), np.float32)}))
    before = model.arrays()
    assert serve(model, blobs, good, None) == Declined("app-failed", "TermsError")
    assert serve(model, blobs, good, structs.replace(opened, strategy="no-such")) == Declined("app-failed", "UnknownProgramError")
    assert serve(model, blobs, Content(), opened) == Declined("app-failed", "TensorError")
    assert serve(model, blobs, Content(arrays={ARRAYS: other}), opened) == Declined("app-failed", "TensorError")
    assert serve(model, blobs, good, opened, message_type="evaluate") == Declined("app-failed", "ValueError")
    assert all(value.tobytes() == before[name].tobytes() for name, value in model.arrays().items())


def test_a_round_of_a_program_that_this_version_does_not_have_is_declined_before_anything_is_read(
    model: EmbeddingClassifier, base: BlobRef, tmp_path: Path
) -> None:
    """A spend for a round that cannot be computed would be lost."""
    store = Store.create(tmp_path / "store.db", b"k" * 32)
    app = ClassifierApp("default", Capture(store), Models(None), lambda: model.spec, min_examples=0)
    opened = terms(model, base, MECHANISM)
    assert app.unready(opened) is None
    assert app.unready(structs.replace(opened, strategy="no-such")) == "unknown-program"
    store.close()

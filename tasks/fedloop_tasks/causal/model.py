"""The on-device language model: a frozen decoder with LoRA on its last layers.

What lies below the adapted layers never changes, so it is computed once for a text and kept; and if the adapters act only from
the assistant's turn on (activated LoRA: Greenewald et al. 2025, arXiv 2504.12397), so are the prompt's keys and values. A step
of training then costs the answer's tokens in the adapted layers alone, and logits where they stand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch
from fedloop_events.errors import UsageError
from fedloop_events.types import CausalSpec
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloop_tasks import precision
from fedloop_tasks.causal import decoder, generation, memory, preferences, probe, training
from fedloop_tasks.causal.chat import Chat, Encoded, TooLongError
from fedloop_tasks.causal.decoder import Prompts
from fedloop_tasks.causal.examples import Example, Feedback, Judged, Pair
from fedloop_tasks.causal.keeping import BATCH_TOKENS, Kept
from fedloop_tasks.causal.plan import PLAIN_RATES, PRIVATE_RATES
from fedloop_tasks.causal.preferences import FeedbackExamples
from fedloop_tasks.causal.training import Answers
from fedloop_tasks.chats import Answer
from fedloop_tasks.models import folder as folders
from fedloop_tasks.models import lora
from fedloop_tasks.models.kept import batches, best_device
from fedloop_tasks.models.on_disk import DiskStates
from fedloop_tasks.models.tensors import Adapted
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.programs.adapter import Training
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.task import ModelError, TooLittleMemoryError
from fedloop_tasks.turns import Turn

CACHE_BYTES: Final = 256 * 2**20
"""Bound on what is kept of a model's texts, in memory: 500 of 40 tokens of SmolLM2 with 8 adapted layers (0.5 MB each), or 2,000
of 60 tokens whose adapters act everywhere. Others go to disk where a model is given a place, or are computed again."""
FILES: Final = (
    "config.json",
    folders.WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What a base model is made of: the last three where it has them."""
_NEEDED: Final = FILES[:4]
_log = logging.getLogger(__name__)
_T = TypeVar("_T", bound=Example | Judged | Pair)
_E = TypeVar("_E")


class Score(NamedTuple):
    """How a model does on one answer, its end included; exact is what it would write greedily."""

    loss: float
    """The sum over its tokens."""
    tokens: int
    exact: bool


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that the base model in `folder` is made of. Raises ModelError if one is missing."""
    found = [name for name in FILES if (folder / name).is_file()]
    if missing := [name for name in _NEEDED if name not in found]:
        raise ModelError(
            f"the base model in {folder} has no {missing[0]}", hint="save the model and its tokenizer into one folder"
        )
    return {name: folders.sha256(folder, name) for name in found}


def describe(
    base_model: str,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | None = None,
    layers: int = 8,
    max_tokens: int = 512,
    max_answer_tokens: int = 128,
    learns: Literal["feedback", "sft", "kto", "dpo"] = "feedback",
    activated: bool = True,
    model_dir: Path | None = None,
) -> CausalSpec:
    """The spec of a language model over a base on this machine, with fewer layers or tokens if it has not so many, and not
    activated if its chat template marks no assistant's turn; without `targets`, every linear module of a layer is adapted. Raises
    ModelError if the base is not there."""
    folder = folders.locate(base_model, model_dir)
    files = hashes(folder)
    config, tokenizer = folders.described(folder)
    family = decoder.family_of(config)
    most = min(max_tokens, decoder.context(config))
    return CausalSpec(
        base_model=base_model,
        files=files,
        rank=rank,
        alpha=alpha,
        targets=list(family.targets if targets is None else targets),
        layers=min(layers, int(config.num_hidden_layers)),
        max_tokens=most,
        max_answer_tokens=min(max_answer_tokens, most // 2),
        learns=learns,
        activated=activated and bool(Chat(tokenizer).invocation),
    )


class CausalModel(Adapted):
    """A language model as `spec` describes it, over the base model on this machine.

    Tensors of a release, in this order: `lora.<layer>.<module>.A` [r, in] and `lora.<layer>.<module>.B` [out, r] for each adapted
    layer and module (by its path within the layer, such as `self_attn.q_proj`, in alphabetical order); all float32. A target of
    the spec names every module whose path ends with it, as in PEFT. Activated adapters act on the tokens of `chat.invocation` and
    those after them, as PEFT's do with these `alora_invocation_tokens`.

    A folder of a LLaMA, Mistral, Qwen2 or GPT-2 serves; a probe at construction compares the split model with the whole one, and
    one before the first training the gradients of a batch with those of its examples. Raises ModelError if the base is absent,
    a file of it has another hash, its template has no invocation for activated adapters, or it fails the probe; and on a CPU
    TooLittleMemoryError where its weights, or later its training, do not fit into what is `free`. What is kept of texts and
    has no room in memory goes to `scratch`, sealed. Not safe for concurrent use by several threads.

    `base_dtype` is what the frozen weights, and so what is kept of texts, are held in; the release's tensors are float32 in any.
    """

    def __init__(
        self,
        spec: CausalSpec,
        *,
        model_dir: Path | None = None,
        device: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        scratch: Scratch | None = None,
        free: memory.Free = memory.free_bytes,
        base_dtype: BaseDtype = "f32",
    ) -> None:
        folder = folders.locate(spec.base_model, model_dir)
        check_files(folder, spec)
        self.spec = spec
        self.device = torch.device(device or best_device())
        self._sizes, self._cache_bytes, self._free = memory.sizes(folder), cache_bytes, free
        self._held = precision.chosen(base_dtype, self._sizes.weights_bytes, self.device.type)
        memory.check_weights(self._sizes, free, self._held)
        tokenizer, base = decoder.load(folder, self._held, self.device)
        self.chat = Chat(tokenizer, activated=spec.activated)
        self._context = decoder.context(base.config)
        self._longest = self._context - 1 - (len(self.chat.invocation) if spec.activated else 0)
        if spec.max_answer_tokens > self._longest:
            raise ModelError(f"max_answer_tokens must be at most {self._longest} for {spec.base_model!r}")
        texts = probe.sample(int(base.config.vocab_size))
        self._tried = [Encoded(ids, len(ids) // 2, 0, len(ids) // 3 if spec.activated else 0) for ids in texts]
        whole = probe.logits_of(base, texts)
        trunk, self.tail, self._tensors = decoder.adapt(base, spec)
        self._adapters = lora.adapters(self.tail, self._tensors)
        probe.check_split(trunk, self.tail, texts, whole, spec.base_model)  # B is zero: it must be the whole one
        self._trunk = trunk.to(self.device)
        self.tail.to(self.device)
        beyond = None if scratch is None else DiskStates(scratch, msgspec.json.encode(spec))
        self._kept = Kept(self._trunk, self.tail, self.device, cache_bytes, beyond)
        probe.check_kept(self.tail, self._tried, self._answers(self._tried), whole, spec.base_model)
        self._trained: set[str] = set()
        self._granted = 0
        self._release_bytes = sum(p.nbytes for p in self._tensors.values())
        alone = Kept(self._trunk, self.tail, self.device, 0)  # what another text left would have other last bits
        self._reference = preferences.Reference(self.tail, lambda encoded: Answers(encoded, alone.states))

    # --- what programs ask for ---

    def check_memory(self, release_bytes: int = 0) -> None:
        """See `Model`. What fitted once is not asked for again: what training has taken and given back is not all free to
        others."""
        self._check_memory(self._rank, release_bytes)

    def fitting_rank(self, most: int, release_bytes: int = 0) -> int:
        """See `Model`."""
        for rank in range(min(most, self.spec.rank), 1, -1):
            with suppress(TooLittleMemoryError):
                self._check_memory(rank, release_bytes)
                return rank
        self._check_memory(1, release_bytes)
        return 1

    def _check_memory(self, rank: int, release_bytes: int) -> None:
        if self.device.type != "cpu":
            return  # it has a memory of its own
        trained = memory.Trained(rank, max(self._fixed_bytes, release_bytes - self._release_bytes))
        needed = memory.training_bytes(self._sizes, self.spec, self._cache_bytes, trained)
        if needed > self._granted:
            memory.check_training(
                self._sizes, self.spec, self._cache_bytes, self._kept.size_bytes, self._free, trained, self._held
            )
            self._granted = needed

    def hyperparameters(self, *, private: bool) -> dict[str, float]:
        """The adapter's learning rate, and the settings of the losses."""
        return (PRIVATE_RATES if private else PLAIN_RATES) | preferences.SETTINGS

    @contextmanager
    def training(
        self, examples: Sequence[Feedback], names: Sequence[str], settings: Mapping[str, float]
    ) -> Iterator[Training | None]:
        """See `Trains`; settings of the losses that are not named are the usual ones. An example of which an answer is too long
        takes no part; how many there are is logged."""
        from fedloop_privacy.dp.dpsgd import ParameterGroup  # imports Opacus, which evaluation does without

        settings = {**preferences.SETTINGS, **settings}
        taken = self._fitting(examples, lambda each: preferences.encode(self.chat, each, self.spec.max_tokens, settings))
        with self.trainable(names if settings["lora_lr"] > 0 else []) as chosen:
            if not chosen:
                yield None
                return
            self.check_memory()
            self._check_gradients(chosen)
            groups = [ParameterGroup(list(chosen.values()), settings["lora_lr"])]
            ready = FeedbackExamples(
                [each for each in taken if each.weighs], self._answers, self._reference.log_probabilities, settings
            )
            yield Training(self.tail, groups, ready, preferences.losses)

    def encoded(self, examples: Sequence[Example]) -> list[Encoded]:
        """The examples in tokens, without those whose answer is too long."""
        return self._fitting(examples, lambda each: self.chat.encode(each.turns, each.answer, self.spec.max_tokens))

    def _fitting(self, examples: Sequence[_T], encode: Callable[[_T], _E]) -> list[_E]:
        found: list[_E] = []
        for each in examples:
            try:
                found.append(encode(each))
            except TooLongError:
                continue
        if left_out := len(examples) - len(found):
            _log.warning("%d of %d examples are left out: their answers do not fit", left_out, len(examples))
        return found

    def states(self, encoded: Sequence[Encoded]) -> tuple[Tensor, Prompts | None]:
        """What the adapted layers get of each example: see `Kept.states`."""
        return self._kept.states(encoded)

    def _answers(self, encoded: Sequence[Encoded]) -> Answers:
        return Answers(encoded, self.states)

    def _check_gradients(self, chosen: Mapping[str, nn.Parameter]) -> None:
        """Once for each set of tensors, before they are trained."""
        if not chosen.keys() <= self._trained:
            tried = probe.feedback(self._tried, self._answers, self._reference.log_probabilities)
            probe.check_gradients(self.tail, self._tensors, chosen, tried, self.spec.base_model)
            self._trained.update(chosen)

    # --- answers ---

    def scores(self, examples: Sequence[Encoded]) -> list[Score]:
        """How the model does on each answer, in one pass: greedy text is the answer if and only if each of its tokens, the end
        included, is the most probable one after those before it."""
        answers = self._answers(examples)
        found: dict[int, Score] = {}
        for batch in batches(answers.lengths, BATCH_TOKENS):
            taken = answers.collate(batch)
            with torch.no_grad():
                losses, hits = training.token_losses(self.tail, taken)
            for row, i in enumerate(batch):
                own = taken.rows == row
                found[i] = Score(float(losses[own].sum()), int(own.sum()), bool(hits[own].all()))
        return [found[i] for i in range(len(examples))]

    def preferences(self, pairs: Sequence[Pair]) -> list[float]:
        """Of each pair, without those of which an answer is too long, by how much it is ranked right: above 0 if it is.

        What counts is how much more probable the adapters make the chosen answer than the rejected one, as in DPO. Where they
        change nothing, it is which of the two the base finds more probable a token: the baseline.
        """
        taken = self._fitting(pairs, lambda each: preferences.encode_pair(self.chat, each, self.spec.max_tokens))
        answers = [answer for each in taken for answer in each]
        scores = self.scores(answers)
        if any(adapter.acts for adapter in self._adapters.values()):
            reference = self._reference.log_probabilities(answers)
            values = [-score.loss - base for score, base in zip(scores, reference, strict=True)]
        else:
            values = [-score.loss / score.tokens for score in scores]
        return [chosen - rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        """Each text's greedy answer, and how probable its tokens were on average."""
        answers = [self.generate([Turn("user", text)]) for text in texts]
        return [each.text for each in answers], [each.confidence for each in answers]

    def generate(
        self,
        turns: Sequence[Turn],
        stream: Callable[[str], None] | None = None,
        *,
        most: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """The answer to the turns, of at most `most` tokens (the spec's, if None); `stream` gets its text as it is written.

        Greedy, or at a temperature above 0 drawn, and then the same for the same seed. A prompt that is longer than what the
        model looks back over loses its beginning, but not where activated adapters begin to act.
        """
        whole, before = None, ""
        for whole in self.writing(turns, most=self.longest_answer if most is None else most, temperature=temperature, seed=seed):
            if stream is not None and len(whole.text) > len(before):
                stream(whole.text[len(before) :])
            before = whole.text
        assert whole is not None
        return whole

    def writing(self, turns: Sequence[Turn], *, most: int, temperature: float = 0.0, seed: int = 0) -> Iterator[Answer]:
        """See `Chats`. Too long a prompt loses its beginning, but not where activated adapters begin to act."""
        if not 0 < most <= self._longest or temperature < 0:
            raise ValueError(f"an answer has 1 to {self._longest} tokens and a temperature of 0 or more")
        prompt = self.chat.prompt(turns)
        cut = max(0, len(prompt) + most - self._context)
        begin = self.chat.begin(prompt[cut:])
        found = generation.tokens(
            self._trunk,
            self.tail,
            prompt[cut:],
            begin=begin,
            most=most,
            ends=self.chat.ends,
            temperature=temperature,
            seed=seed,
        )
        return generation.writing(found, self.chat.decode, self.chat.ends, cut)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Model`: the mean over a text's tokens of what the base model's last layer gives. No adapter acts, for a text is no
        answer: embeddings of all releases can be compared."""
        rows: list[Tensor] = []
        for text in texts:
            ids = self.chat.text(text)
            if len(ids) > self._context:
                raise UsageError(f"a text has {len(ids):,} tokens, and the model takes at most {self._context:,}")
            with self.tail.frozen():
                states = self.tail.run(self._trunk(torch.tensor([ids], device=self.device)))
                rows.append(nn.functional.normalize(self.tail.norm(states)[0].float().mean(0), dim=0).cpu())
        return torch.stack(rows).numpy()

    @property
    def context(self) -> int:
        """See `Chats`."""
        return self._context

    @property
    def longest_answer(self) -> int:
        """See `Chats`."""
        return self.spec.max_answer_tokens

    def prompt_tokens(self, turns: Sequence[Turn]) -> int:
        """See `Chats`."""
        return len(self.chat.prompt(turns))


def check_files(folder: Path, spec: CausalSpec) -> None:
    """Raises ModelError unless the base model in `folder` is the one of the spec, file by file."""
    found = hashes(folder)
    for name in dict.fromkeys([*spec.files, *found]):
        if found.get(name) != spec.files.get(name):
            here, there = (str(each.get(name, "none"))[:12] for each in (found, spec.files))
            raise ModelError(
                f"{name} of the base model {spec.base_model!r} has SHA-256 {here}, the model's spec says {there}",
                hint="install the version of the base model that the deployment was made with",
            )

"""Learning from what users made of answers: cross entropy for an answer to learn, KTO for a judged one, DPO for a pair.

log p is the sum over an answer's own tokens, the end included, and r = log p - log p_ref. An example's loss is

- `Example`: `sft_weight` times the mean of -log p over its tokens;
- `Pair`: -`dpo_weight` log sigma(beta (r_chosen - r_rejected)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), plus the former
  of the chosen answer where that is to be learnt;
- `Judged`: `kto_desirable` (1 - sigma(beta (r - z))) if it is good, else `kto_undesirable` (1 - sigma(beta (z - r))) (Ethayarajh
  et al. 2024, arXiv 2402.01306, section 4).

No loss depends on another example, for DP-SGD bounds what one of them can do by clipping its gradient alone. KTO's reference
point z is usually the mean of r over other answers of the batch (TRL does so): removing one example then changes the gradients of
all others, and the sensitivity of a step is no longer the clip norm. So z is a number of the round, `kto_z`. It is 0
unless the round says otherwise, at which it starts in any case: no model diverges from itself.

The reference is the frozen base model, not the release that a round starts from. Rounds are then pieces of one
optimisation of one objective: a pair that is ranked right by enough has a small gradient in the next round too, where a new
reference would begin again at r = 0 and let the model drift with each round. Its log-probabilities
depend on the base and the example alone, so they are computed once for all rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloop_tasks.causal import training
from fedloop_tasks.causal.chat import Chat, Encoded
from fedloop_tasks.causal.examples import Example, Feedback, Pair
from fedloop_tasks.causal.training import Answers
from fedloop_tasks.models.kept import KeptStates
from fedloop_tasks.models.lora import turned_off

SETTINGS: Final = {
    "beta": 0.1,
    "sft_weight": 1.0,
    "dpo_weight": 1.0,
    "kto_desirable": 1.0,
    "kto_undesirable": 1.0,
    "kto_z": 0.0,
}
"""What a round may set of the losses, with what it gets otherwise. What has weight 0 is not learnt from."""
_REFERENCES: Final = 65_536
"""Log-probabilities that are kept of the base."""


class EncodedFeedback(NamedTuple):
    """An example in tokens, and what its losses weigh."""

    answers: tuple[Encoded, ...]
    """One, or of a pair the chosen one and the rejected one."""
    sft: float = 0.0
    dpo: float = 0.0
    kto: float = 0.0
    """Below 0 for an answer that was judged bad."""

    @property
    def weighs(self) -> bool:
        return any(each != 0 for each in self[1:])


def encode(chat: Chat, given: Feedback, most: int, settings: Mapping[str, float]) -> EncodedFeedback:
    """Each answer with its prompt in at most `most` tokens. Raises TooLongError if an answer does not fit."""
    if isinstance(given, Pair):
        learnt = settings["sft_weight"] if given.learn else 0.0
        return EncodedFeedback(encode_pair(chat, given, most), sft=learnt, dpo=settings["dpo_weight"])
    answers = (chat.encode(given.turns, given.answer, most),)
    if isinstance(given, Example):
        return EncodedFeedback(answers, sft=settings["sft_weight"])
    return EncodedFeedback(answers, kto=settings["kto_desirable"] if given.good else -settings["kto_undesirable"])


def encode_pair(chat: Chat, given: Pair, most: int) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected answer after the same prompt: where one of them needs more of it cut off, both lose that.

    Raises TooLongError if one does not fit.
    """
    chosen, rejected = (chat.encode(given.turns, answer, most) for answer in (given.chosen, given.rejected))
    cut = max(chosen.cut, rejected.cut)
    return _without_beginning(chosen, cut - chosen.cut), _without_beginning(rejected, cut - rejected.cut)


def _without_beginning(given: Encoded, tokens: int) -> Encoded:
    return Encoded(given.ids[tokens:], given.start - tokens, given.cut + tokens, max(0, given.begin - tokens))


class Reference:
    """The log-probabilities of answers by the base, which is the model with its adapters off.

    Each answer goes through it by itself, once: what comes out depends on the answer alone, to the last bit, not on what else was
    in a batch or was kept of other texts, so that a device that starts again trains on the same numbers. The last ones are kept.
    """

    def __init__(self, module: nn.Module, answers: Callable[[Sequence[Encoded]], Answers]) -> None:
        self._module, self._answers = module, answers
        self._kept = KeptStates(_REFERENCES * 8)

    def log_probabilities(self, answers: Sequence[Encoded]) -> list[float]:
        return [self._log_probability(each) for each in answers]

    def _log_probability(self, answer: Encoded) -> float:
        key = hashlib.sha256(msgspec.msgpack.encode(answer)).digest()
        found = self._kept.get(key)
        if found is None:
            with torch.no_grad(), turned_off(self._module):
                losses, _ = training.token_losses(self._module, self._answers([answer]).collate([0]))
            found = -losses.double().sum().cpu()
            self._kept.put(key, found)
        return float(found)


class Batch(NamedTuple):
    """Answers of B examples, R in all, those of an example one after another; what weighs is of shape [B]."""

    beta: float
    z: float
    answers: training.Batch
    owners: Tensor
    """Of each answer, which example it is of: [R]."""
    signs: Tensor
    """Of each answer, -1 if it is rejected for another, else 1: [R]."""
    reference: Tensor
    """Of each answer, its log-probability by the base: [R]. 0 where no loss asks for it."""
    sft: Tensor
    dpo: Tensor
    kto: Tensor


class FeedbackExamples:
    """See `SeveralRows`: a pair is two rows, and as long as the longer of them. `reference` gives log-probabilities by the
    base."""

    def __init__(
        self,
        examples: Sequence[EncodedFeedback],
        answers: Callable[[Sequence[Encoded]], Answers],
        reference: Callable[[Sequence[Encoded]], list[float]],
        settings: Mapping[str, float],
    ) -> None:
        self._examples, self._reference = examples, reference
        self._beta, self._z = settings["beta"], settings["kto_z"]
        self._answers = answers([answer for each in examples for answer in each.answers])
        self.row_counts: Sequence[int] = [len(each.answers) for each in examples]
        self._rows: list[range] = []
        for count in self.row_counts:
            start = self._rows[-1].stop if self._rows else 0
            self._rows.append(range(start, start + count))
        self.lengths: Sequence[int] = [max(self._answers.lengths[row] for row in rows) for rows in self._rows]

    def collate(self, indices: Sequence[int]) -> Batch:
        chosen = [self._examples[i] for i in indices]
        reference = [value for each in chosen for value in self._references(each)]
        answers = self._answers.collate([row for i in indices for row in self._rows[i]])
        owners = [n for n, each in enumerate(chosen) for _ in each.answers]
        signs = [sign for each in chosen for sign in (1.0, -1.0)[: len(each.answers)]]
        sft, dpo, kto = zip(*(each[1:] for each in chosen), strict=True)
        device = answers.wanted.device
        tensors = [torch.tensor(values, device=device) for values in (owners, signs, reference, sft, dpo, kto)]
        return Batch(self._beta, self._z, answers, *tensors)

    def _references(self, example: EncodedFeedback) -> list[float]:
        if not example.dpo and not example.kto:
            return [0.0] * len(example.answers)
        return self._reference(example.answers)


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """One for each example, by the formulas above: [B]. The loss that Transformers computes from `labels` is the mean over the
    tokens of the whole batch, so that an example's gradient would depend on the others."""
    each, _ = training.token_losses(module, batch.answers)
    answers, examples = len(batch.owners), len(batch.sft)
    sums = each.new_zeros(answers).index_add(0, batch.answers.rows, each)
    means = sums / torch.bincount(batch.answers.rows, minlength=answers)
    ratios = each.new_zeros(examples).index_add(0, batch.owners, batch.signs * (-sums - batch.reference))
    own = each.new_zeros(examples).index_add(0, batch.owners, means * (batch.signs > 0))
    pairs = F.softplus(-batch.beta * ratios)
    judged = torch.sigmoid(-batch.beta * batch.kto.sign() * (ratios - batch.z))
    return batch.sft * own + batch.dpo * pairs + batch.kto.abs() * judged

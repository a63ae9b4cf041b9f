"""Losses of pairs, thumbs and answers to learn: against one example at a time, the papers' formulas, and TRL."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from fedloop_events.types import BlobRef, Mechanism, RoundOpened
from fedloop_privacy.dp.dpsgd import example_gradients
from fedloop_tasks.causal import preferences, probe, training
from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.examples import Example, Feedback, Judged, Pair
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.programs.adapter import default_hyperparameters
from fedloop_tasks.table import program_of
from fedloop_tasks.task import ModelError, TermsError
from fedloop_tasks.turns import Turn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

CARD = (Turn("user", "where is my card"),)
LOAN = (Turn("system", "be short"), Turn("user", "a loan for a house, can I have one?"))
PAIRS = [
    Pair(CARD, "we have sent it to you today", "yes"),
    Pair(LOAN, "no", "a loan is for a house, and a house is for you"),
    Pair((Turn("user", "hi"),), "a card", "a loan", learn=True),
]
MIXED: list[Feedback] = [
    Example(CARD, "we have sent it"),
    PAIRS[0],
    Judged(LOAN, "yes, you can", good=True),
    PAIRS[1],
    Judged(CARD, "the card is lost", good=False),
    PAIRS[2],
]
SETTINGS = {
    "beta": 0.3,
    "sft_weight": 0.7,
    "dpo_weight": 1.5,
    "kto_desirable": 1.2,
    "kto_undesirable": 0.8,
    "kto_z": 0.4,
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


def fresh(folder: Path, **settings: Any) -> CausalModel:
    """A model whose adapters have no effect."""
    spec = describe(folder.name, model_dir=folder, **{"rank": 4, "layers": 2, "max_answer_tokens": 24} | settings)
    return CausalModel(spec, model_dir=folder, device="cpu")


def made(folder: Path, **settings: Any) -> CausalModel:
    """A model whose adapters change answers' probabilities a lot."""
    model = fresh(folder, **settings)
    random = np.random.default_rng(0)
    model.load({name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in model.shapes.items()})
    return model


class ByHand:
    """The losses of the papers, for one example at a time; the reference is the model that Transformers loads."""

    def __init__(self, folder: Path, model: CausalModel) -> None:
        self.model, self.base = model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def policy(self, turns: Sequence[Turn], answer: str) -> Tensor:
        """The log-probability of each token."""
        taken = self.model._answers([self.encoded(turns, answer)]).collate([0])
        return -training.token_losses(self.model.tail, taken)[0]

    def reference(self, turns: Sequence[Turn], answer: str) -> float:
        encoded = self.encoded(turns, answer)
        with torch.no_grad():
            logs = self.base(input_ids=torch.tensor([encoded.ids])).logits[0].log_softmax(1)
        return sum(float(logs[n - 1, encoded.ids[n]]) for n in range(encoded.start, len(encoded.ids)))

    def encoded(self, turns: Sequence[Turn], answer: str) -> Encoded:
        return self.model.chat.encode(turns, answer, self.model.spec.max_tokens)

    def ratio(self, turns: Sequence[Turn], answer: str) -> Tensor:
        return self.policy(turns, answer).sum() - self.reference(turns, answer)

    def loss(self, given: Feedback, settings: dict[str, float]) -> Tensor:
        beta, z = settings["beta"], settings["kto_z"]
        if isinstance(given, Example):
            return settings["sft_weight"] * -self.policy(given.turns, given.answer).mean()
        if isinstance(given, Judged):
            ratio = self.ratio(given.turns, given.answer)
            if given.good:
                return settings["kto_desirable"] * (1 - torch.sigmoid(beta * (ratio - z)))
            return settings["kto_undesirable"] * (1 - torch.sigmoid(beta * (z - ratio)))
        margin = self.ratio(given.turns, given.chosen) - self.ratio(given.turns, given.rejected)
        loss = settings["dpo_weight"] * -torch.sigmoid(beta * margin).log()
        return loss + self.loss(Example(given.turns, given.chosen), settings) if given.learn else loss


Losses = Callable[[Any, preferences.Batch], Tensor]


def gradients(model: CausalModel, given: Sequence[Feedback], losses: Losses = preferences.losses) -> list[list[Tensor]]:
    """Of each example in one batch, parameter by parameter."""
    with model.training(given, list(model.shapes), {"lora_lr": 1.0} | SETTINGS) as ready:
        assert ready is not None
        parameters = list(ready.groups[0].parameters)
        together = example_gradients(ready.module, parameters, ready.examples, losses, range(len(given)))
        return [[each[row] for each in together] for row in range(len(given))]


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors))


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Relative to the other."""
    return norm([a - b for a, b in zip(one, other, strict=True)]) / norm(other)


# --- values and gradients ---


@pytest.mark.parametrize("activated", [True, False])
def test_each_loss_is_that_of_its_paper_in_a_mixed_batch_too(folder: Path, activated: bool) -> None:
    model = made(folder, activated=activated)
    by_hand = ByHand(folder, model)
    with model.training(MIXED, list(model.shapes), {"lora_lr": 1.0} | SETTINGS) as ready, torch.no_grad():
        assert ready is not None
        found = ready.losses(ready.module, ready.examples.collate(range(len(MIXED))))
        expected = torch.stack([by_hand.loss(each, SETTINGS) for each in MIXED])
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4)


@pytest.mark.parametrize("activated", [True, False])
def test_gradients_in_a_mixed_batch_are_those_of_each_example_by_itself(folder: Path, activated: bool) -> None:
    model = made(folder, activated=activated)
    by_hand, found = ByHand(folder, model), gradients(model, MIXED)
    with model.trainable(list(model.shapes)) as chosen:
        for given, together in zip(MIXED, found, strict=True):
            alone = torch.autograd.grad(by_hand.loss(given, SETTINGS), list(chosen.values()))
            assert apart(together, alone) < 1e-3, given


def test_a_private_round_clips_a_pair_as_one_example(folder: Path) -> None:
    """FFA-LoRA by the program, with noise that does not show, against gradients of one example at a time."""
    model = made(folder)
    before, by_hand = model.arrays(), ByHand(folder, model)
    program, clip, rate, divisor = program_of("ffa"), 0.05, 2.0, 4.0
    upload = program.upload(list(before))
    expected = {name: torch.from_numpy(before[name]).double() for name in upload}
    with model.trainable(upload) as chosen:
        for given in MIXED:
            each = torch.autograd.grad(by_hand.loss(given, SETTINGS), list(chosen.values()))
            assert norm(each) > clip
            for name, gradient in zip(chosen, each, strict=True):
                expected[name] -= rate / divisor * gradient * clip / norm(each)
    terms = Mechanism(sampling_rate=1.0, noise_multiplier=1e-6, clip_norm=clip, steps=1, divisor=divisor)
    update = program.compute(model, MIXED, opened(upload, terms, {"lora_lr": rate} | SETTINGS))
    moved = [expected[name] - torch.from_numpy(before[name]) for name in upload]
    assert apart([torch.from_numpy(update[name] - before[name]) for name in upload], moved) < 1e-2


# --- a loss that depends on the batch ---


def tokens_of_the_batch(module: Any, batch: preferences.Batch) -> Tensor:
    """Cross entropy over the tokens of the whole batch, as Transformers computes it from `labels`."""
    each, _ = training.token_losses(module, batch.answers)
    size = len(batch.owners)
    whole = each.new_zeros(size).index_add(0, batch.answers.rows, each) / len(each)
    mean = whole * len(each) / torch.bincount(batch.answers.rows, minlength=size)
    first = batch.signs > 0
    added = whole.new_zeros(len(batch.sft)).index_add(0, batch.owners, (whole - mean) * first)
    return preferences.losses(module, batch) + batch.sft * added


def reference_point_of_the_batch(module: Any, batch: preferences.Batch) -> Tensor:
    """KTO with the mean log-ratio of the batch for z, as it is published."""
    with torch.no_grad():
        each, _ = training.token_losses(module, batch.answers)
        logs = -each.new_zeros(len(batch.owners)).index_add(0, batch.answers.rows, each)
        ratios = (logs - batch.reference)[batch.reference != 0]
    return preferences.losses(module, batch._replace(z=float(ratios.mean()) if len(ratios) else 0.0))


def mean_of_the_pairs(module: Any, batch: preferences.Batch) -> Tensor:
    """Each pair's share of DPO's mean over those of the batch, which is what TRL's trainer returns."""
    right, pairs = preferences.losses(module, batch), batch.dpo > 0
    return torch.where(pairs, right / pairs.sum().clamp(min=1), right)


WRONG = [tokens_of_the_batch, reference_point_of_the_batch, mean_of_the_pairs]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_loss_that_depends_on_the_batch_has_other_gradients_there(llama: Path, wrong: Losses) -> None:
    model = made(llama)
    worst = {}
    for losses in (wrong, preferences.losses):
        together, alone = gradients(model, MIXED, losses), [gradients(model, [each], losses)[0] for each in MIXED]
        worst[losses] = max(apart(*each) for each in zip(together, alone, strict=True))
    assert worst[preferences.losses] < 1e-3
    assert worst[wrong] > 0.02


@pytest.mark.parametrize("wrong", WRONG)
def test_the_probe_refuses_a_loss_that_depends_on_the_batch(llama: Path, wrong: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "losses", wrong)
    with (
        pytest.raises(ModelError, match="another gradient in a batch"),
        made(llama).training(MIXED, ["lora.3.mlp.up_proj.B"], {"lora_lr": 1}),
    ):
        pass


# --- TRL ---


def merged(folder: Path, model: CausalModel) -> Any:
    """The model as Transformers has it, the adapters multiplied out into its weights."""
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    arrays = model.arrays()
    with torch.no_grad():
        for name in arrays:
            if name.endswith(".A"):
                _, layer, path = name.removesuffix(".A").split(".", 2)
                a, b = (torch.from_numpy(arrays[name.removesuffix("A") + factor]) for factor in "AB")
                place = "transformer.h" if folder.name == "gpt2" else "model.layers"
                change = model.spec.alpha / model.spec.rank * b @ a
                base.get_submodule(f"{place}.{layer}.{path}").weight += change.T if folder.name == "gpt2" else change
    return base


class Trl:
    """The losses of TRL's own trainers, on the tokens that the model under test has."""

    def __init__(self, folder: Path, model: CausalModel, scratch: Path) -> None:
        self.model, self.policy = model, merged(folder, model)
        self.base: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.usual: dict[str, Any] = {
            "output_dir": str(scratch),
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "max_length": None,
        }

    def tokens(self, turns: Sequence[Turn], answer: str) -> tuple[list[int], list[int]]:
        encoded = self.model.chat.encode(turns, answer, self.model.spec.max_tokens)
        return encoded.ids[: encoded.start], encoded.ids[encoded.start :]

    def dpo(self, pair: Pair, **settings: Any) -> float:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        trainer: Any = DPOTrainer(
            model=self.policy,
            ref_model=self.base,
            args=DPOConfig(**self.usual, **settings),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=self.tokenizer,
        )
        (prompt, chosen), (_, rejected) = (self.tokens(pair.turns, answer) for answer in (pair.chosen, pair.rejected))
        batch = trainer.data_collator([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
        return float(trainer.compute_loss(trainer.model, batch).detach())

    def kto(self, judged: Judged, *, others: Sequence[str] = (), **settings: Any) -> tuple[float, float]:
        """The loss, and the z that it has been computed with: the mean over the answers `others` to the same turns."""
        from datasets import Dataset
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        kinds: dict[str, Any] = {"loss_type": "kto" if others else "apo_zero_unpaired", "per_device_train_batch_size": 2}
        trainer: Any = KTOTrainer(
            model=self.policy,
            ref_model=self.base,
            args=KTOConfig(**self.usual, **kinds, **settings),
            train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": good} for good in (True, False)]),
            processing_class=self.tokenizer,
        )
        prompt, answer = self.tokens(judged.turns, judged.answer)
        row = {"prompt_ids": prompt, "completion_ids": answer, "label": judged.good}
        rows = [row | {"KL_completion_ids": self.tokens(judged.turns, other)[1]} for other in others] or [row]
        loss = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).detach())
        return loss, trainer._metrics["eval"]["kl"][-1]


@pytest.fixture
def trl(folder: Path, tmp_path: Path) -> Trl:
    return Trl(folder, made(folder, activated=False), tmp_path)


def own(model: CausalModel, given: Feedback, settings: dict[str, float]) -> float:
    with model.training([given], list(model.shapes), {"lora_lr": 1.0} | settings) as ready, torch.no_grad():
        assert ready is not None
        return float(ready.losses(ready.module, ready.examples.collate([0])))


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_dpo_is_that_of_trl(trl: Trl) -> None:
    for beta in (0.1, 0.5):
        for pair in PAIRS:
            kinds: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]} if pair.learn else {}
            expected = trl.dpo(pair, beta=beta, **kinds)
            assert own(trl.model, pair, {"beta": beta, "sft_weight": 0.7}) == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("good", [True, False])
def test_kto_is_that_of_trl(trl: Trl, good: bool) -> None:
    """Without a reference point; and with the one that TRL takes from its batch, as a number of the round."""
    judged, settings = Judged(LOAN, "yes, you can", good), {"beta": 0.3, "kto_desirable": 1.2, "kto_undesirable": 0.8}
    weights: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    loss, z = trl.kto(judged, **weights)
    assert z == 0
    assert own(trl.model, judged, settings) == pytest.approx(loss, rel=1e-4)
    loss, z = trl.kto(judged, others=["we have sent it", "the card is lost"], **weights)
    assert own(trl.model, judged, settings | {"kto_z": z}) == pytest.approx(loss, rel=1e-4)


# --- the reference ---


def test_the_reference_is_the_base_whatever_the_release(folder: Path) -> None:
    model = made(folder)
    by_hand, before = ByHand(folder, model), model.arrays()
    answers = [by_hand.encoded(each.turns, each.chosen) for each in PAIRS]
    expected = [by_hand.reference(each.turns, each.chosen) for each in PAIRS]
    assert model._reference.log_probabilities(answers) == pytest.approx(expected, rel=1e-5)
    assert all(np.array_equal(values, before[name]) for name, values in model.arrays().items())
    assert fresh(folder)._reference.log_probabilities(answers) == model._reference.log_probabilities(answers)


def test_a_reference_has_the_same_bits_in_every_company(folder: Path) -> None:
    """As a device that is started again must have: its first batch is another one."""
    runs = []
    for indices in ([[0, 1, 2, 3, 4, 5]], [[5, 1], [3], [4, 0, 2]], [[n] for n in range(6)]):
        model, found = made(folder), {}
        with model.training(MIXED, list(model.shapes), {"lora_lr": 1.0}) as ready:
            assert ready is not None
            for batch in indices:
                taken = ready.examples.collate(batch)
                for owner, sign, value in zip(taken.owners, taken.signs, taken.reference, strict=True):
                    found[batch[int(owner)], float(sign)] = float(value)
        runs.append(found)
    assert runs[0] == runs[1] == runs[2]


def test_a_reference_is_computed_once_and_disturbs_no_gradient(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(llama)
    encoded = [model.chat.encode(CARD, answer, 128) for answer in ("we have sent it", "the card is lost")]
    with model.trainable(list(model.shapes)) as chosen:
        by_hand = ByHand(llama, model)
        expected = torch.autograd.grad(by_hand.policy(CARD, "yes").sum(), list(chosen.values()))
        loss = by_hand.policy(CARD, "yes").sum()
        values = model._reference.log_probabilities(encoded)
        assert apart(torch.autograd.grad(loss, list(chosen.values())), expected) == 0
    monkeypatch.setattr(training, "token_losses", None)
    assert model._reference.log_probabilities(encoded) == values


# --- what is taken ---


def test_a_pair_is_as_long_as_its_longer_answer_and_both_follow_the_same_prompt(llama: Path) -> None:
    model = made(llama, max_tokens=64, activated=False)
    pair = Pair((Turn("user", "where is my card? " * 20),), "yes", "we have sent it to you today, to your house")
    chosen, rejected = preferences.encode_pair(model.chat, pair, 64)
    assert (len(chosen.ids) < len(rejected.ids), len(rejected.ids)) == (True, 64)
    assert chosen.ids[: chosen.start] == rejected.ids[: rejected.start]
    assert chosen.cut == rejected.cut > 0
    assert [each.ids[each.start :] for each in (chosen, rejected)] == [
        model.chat.answer(text) for text in (pair.chosen, pair.rejected)
    ]
    for given in (pair, Pair(pair.turns, pair.rejected, pair.chosen)):
        with model.training([given], list(model.shapes), {"lora_lr": 1.0}) as ready:
            assert ready is not None
            assert ready.examples.lengths == [63]


def test_an_example_of_which_an_answer_does_not_fit_is_left_out_whole(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, long = made(llama, max_tokens=64), "we have sent it " * 20
    given = [*MIXED, Pair(CARD, "yes", long), Pair(CARD, long, "yes"), Judged(CARD, long, good=True), Example(CARD, long)]
    with caplog.at_level(logging.WARNING), model.training(given, list(model.shapes), {"lora_lr": 1.0}) as ready:
        assert ready is not None
        assert len(ready.examples.lengths) == len(MIXED)
    assert "4 of 10 examples are left out" in caplog.text
    assert len(model.preferences([PAIRS[0], Pair(CARD, "yes", long)])) == 1


@pytest.mark.parametrize(
    ("named", "left"),
    [
        ({"sft_weight": 0.0}, MIXED[1:]),
        ({"dpo_weight": 0.0}, [MIXED[0], MIXED[2], MIXED[4], MIXED[5]]),
        ({"kto_desirable": 0.0}, [*MIXED[:2], *MIXED[3:]]),
        ({"kto_undesirable": 0.0}, [*MIXED[:4], MIXED[5]]),
    ],
)
def test_what_weighs_nothing_takes_no_part(llama: Path, named: dict[str, float], left: list[Feedback]) -> None:
    model = made(llama)
    found = []
    for given in (MIXED, left):
        with model.training(given, list(model.shapes), {"lora_lr": 1.0} | named) as ready, torch.no_grad():
            assert ready is not None
            found.append(ready.losses(ready.module, ready.examples.collate(range(len(ready.examples.lengths)))))
    assert torch.equal(*found)


# --- rounds ---


def opened(upload: list[str], mechanism: Mechanism | None, settings: dict[str, float], strategy: str = "ffa") -> RoundOpened:
    return RoundOpened(
        origin="test",
        epoch=0,
        run_id="main",
        round_id="r0001",
        request_id="q",
        number=1,
        model="default",
        base_release="0000-0",
        base=BlobRef("0" * 64, 1),
        strategy=strategy,
        cohort=["a"],
        quorum=1,
        deadline_s=60.0,
        upload=upload,
        max_upload_bytes=1 << 20,
        max_update_norm=1e6,
        mechanism=mechanism,
        hyperparameters=settings,
    )


@pytest.mark.parametrize("name", list(preferences.SETTINGS))
def test_a_round_sets_each_number_of_the_losses(llama: Path, name: str) -> None:
    updates = []
    for settings in ({}, {name: 0.5}):
        model = made(llama)
        assert default_hyperparameters(model, private=True)[name] == preferences.SETTINGS[name]
        upload = list(model.shapes)
        updates.append(program_of("fedavg").compute(model, MIXED, opened(upload, None, settings, "fedavg")))
    assert any(not np.array_equal(updates[0][key], updates[1][key]) for key in updates[0])
    with pytest.raises(TermsError, match=f"{name} must be finite and not negative"):
        program_of("fedavg").compute(model, MIXED, opened(upload, None, {name: -1.0}, "fedavg"))


def learnt(folder: Path, given: Sequence[Feedback]) -> CausalModel:
    model = fresh(folder)
    model.load(model.initial_arrays(0))
    terms = opened(list(model.shapes), None, {"lora_lr": 0.003, "local_epochs": 20, "batch": 3}, "fedavg")
    program_of("fedavg").compute(model, given, terms)
    return model


def test_pairs_are_ranked_right_after_dpo_and_as_the_base_ranks_them_before(folder: Path) -> None:
    before = fresh(folder)
    before.load(before.initial_arrays(0))
    by_hand = ByHand(folder, before)
    with torch.no_grad():
        expected = [
            float(by_hand.policy(each.turns, each.chosen).mean() - by_hand.policy(each.turns, each.rejected).mean())
            for each in PAIRS
        ]
    assert before.preferences(PAIRS) == pytest.approx(expected, abs=1e-5)
    after = learnt(folder, PAIRS)
    by_hand = ByHand(folder, after)
    with torch.no_grad():
        expected = [float(by_hand.ratio(each.turns, each.chosen) - by_hand.ratio(each.turns, each.rejected)) for each in PAIRS]
    assert after.preferences(PAIRS) == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0
    assert after.preferences([]) == []


def test_kto_makes_good_answers_more_probable_and_bad_ones_less(folder: Path) -> None:
    judged = [Judged(CARD, "we have sent it", good=True), Judged(LOAN, "yes", good=False)]
    by_hand = ByHand(folder, learnt(folder, judged))
    with torch.no_grad():
        good, bad = (float(by_hand.ratio(each.turns, each.answer)) for each in judged)
    assert good > 0 > bad

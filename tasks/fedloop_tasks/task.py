"""The two seams: a task says what a model learns, a program how one round learns it. Nothing here imports torch.

Nothing outside this package knows a label, a head, a loss or a tensor's name. A new task is a folder here, a new way to learn a
file in `programs`, and both stand in the `table` of those that exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.errors import FedloopError
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types import Mechanism, RoundOpened, Spec
from msgspec import Struct

from fedloop_tasks.evaluation import Measured
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.turns import Turn

Arrays = Mapping[str, Array]
"""Tensors by name, in the order of their blob."""
STATE: Final = "state."
"""The beginning of the names of a release's tensors that only a program reads: `state.PROGRAM.`, and what is its own. They are no
part of the model: devices, evaluation and export never see them, and neither do rounds of another program."""
UPDATE_BITS: Final = "update_bits"
"""The hyperparameter of a round that says of how many bits its updates' numbers are: see `updates`."""
Evaluate = Callable[[Arrays], Measured]
"""What a release is worth, given its tensors, on the server's held-out set."""


class ModelError(FedloopError):
    """The base model is absent, is not the one that the spec names, or is of a kind that cannot be adapted."""


class TooLittleMemoryError(ModelError):
    """The model, or its training, does not fit into the memory that is free. The message holds numbers, and nobody's words."""


class TermsError(FedloopError):
    """A round asks for something that its program does not do."""


# --- what users do -------------------------------------------------------------------------------------------------------


class Interaction(Struct, frozen=True, kw_only=True):
    """One response of a model, and one thing that its user did about it. Every text is masked.

    A user who comes back to a response makes another interaction of the same id.
    """

    interaction_id: str
    release: str
    context: Sequence[MaskedTurn] = ()
    """What came before the prompt, oldest first; of a long conversation the newest turns."""
    prompt: MaskedText
    response: MaskedText | None = None
    predicted: str | None = None
    """What was answered where that is one of a closed set of words, such as a label."""
    thumb: Literal["up", "down"] | None = None
    rating: int | None = None
    """1 to 5."""
    label: str | None = None
    edit: MaskedText | None = None
    """The better answer, in the user's words."""
    preferred_over: str | None = None
    """The interaction whose response was the worse of two."""
    signal: str | None = None
    """What the user did that is no judgement, such as "copied"."""


class Message(Struct, frozen=True):
    """What a user writes, and an answer: the right one, unless the rest says otherwise."""

    text: str
    answer: str
    earlier: tuple[Turn, ...] = ()
    """What was said before."""
    rejected: str | None = None
    """A worse answer."""
    good: bool | None = None
    """What a user thought of the answer, who knows no better one."""


class BadRow(Struct, frozen=True):
    """A row that cannot be used: the line of the file that it begins in, or its number, and why, without a word of it."""

    line: int
    reason: str


class Messages(Struct, frozen=True):
    """The messages of the file at `path` that can be used, where they begin, and the rows that cannot be used.

    What `lines` counts is the `unit`: rows in a file that has no lines.
    """

    path: Path
    rows: list[Message]
    lines: list[int]
    bad: list[BadRow] = []
    unit: Literal["line", "row"] = "line"

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows cannot be used, by reason."""
        return dict(Counter(each.reason for each in self.bad))


class Option(Struct, frozen=True):
    """What the command line takes for a task: `--name METAVAR`, a file or, where `kind` is str, a word."""

    name: str
    metavar: str
    help: str
    kind: type = Path
    required: bool = False


class Material(Struct, frozen=True):
    """What a deployment is made of, as the operator's files have it. `about` is the task's own, such as its labels; `notes` say
    what in it may be a mistake; `public` is nobody's own, and what the first release may learn; `shape` is what the operator
    sets of the model's spec."""

    about: list[str]
    held_out: list[Message]
    skipped: dict[str, int]
    notes: list[str] = []
    public: list[Message] = []
    shape: dict[str, Any] = {}


# --- rounds --------------------------------------------------------------------------------------------------------------


class Terms(Struct, frozen=True):
    """What every client of a round is asked for. Updates may be as long as `least_norm`, whatever the server's bound is."""

    program: str
    mechanism: Mechanism | None
    hyperparameters: dict[str, float]
    least_norm: float = 0.0


class Plan(Protocol):
    """The rounds of a deployment, planned by its task from the operator's settings: public numbers alone, none from a device.

    Implemented by a frozen struct whose fields are keys of `server.toml`; `MEANING` explains each of them. Every plan has those
    that `fedloop server init` sets: `epsilon`, `delta`, `strategy`, `planned_rounds` and `nominal_examples`.
    """

    MEANING: ClassVar[Mapping[str, str]]
    NONE: ClassVar[Mapping[str, str]]
    """What stands for None, by key: TOML does not have it."""

    def mechanisms(self) -> dict[str, Mechanism]:
        """Each program's mechanism, which together keep the budget; none without one. May take seconds.

        Raises `UsageError`, which names what would be possible, if no noise keeps the budget.
        """

    @property
    def programs(self) -> Sequence[str]:
        """Every program that a round may run."""

    def next_program(self, made: Sequence[str]) -> str | None:
        """The program of the next round, after rounds of the programs `made`; None if the plan is used up."""

    def terms(self, program: str, mechanism: Mechanism | None) -> Terms:
        """The terms of a round of that program."""

    @property
    def exhausted(self) -> str:
        """Why there is no round any more, once the plan is used up."""


class Model(Protocol):
    """A model in memory that holds one release at a time. Not safe for concurrent use."""

    @property
    def spec(self) -> Spec: ...

    def load(self, arrays: Arrays) -> None:
        """Take a release's tensors. Raises `TensorError`, and is then as it was, unless they are exactly this model's."""

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Copies of the tensors `names` (all, if None). Raises `TensorError` for a name that is not the model's."""

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        """Each text's answer, and how sure the model is of it, from 0 to 1."""

    def embed(self, texts: Sequence[str]) -> Array:
        """Each text as a unit vector, [n, d] float32: texts of much the same meaning have a large product. Raises `UsageError`
        for one that is longer than the model takes."""

    def check_memory(self, release_bytes: int = 0) -> None:
        """Raises `TooLittleMemoryError` if training a release of that size, or the one that is loaded, may need more memory than
        is free, whatever the examples are."""

    def fitting_rank(self, most: int, release_bytes: int = 0) -> int:
        """The largest rank of adapters, at most `most`, at which `check_memory` would pass. Raises `TooLittleMemoryError` if
        there is none."""

    def at_rank(self, rank: int) -> AbstractContextManager[None]:
        """Of each adapter, the first `rank` components are the model's tensors as long as the block lasts, and the rest acts but
        is none. Afterwards the whole ones are, with what became of the first."""


Combine = Callable[[RoundOpened, Arrays, Arrays, Iterable[tuple[Arrays, float]]], dict[str, Array]]
"""How updates become one where their mean is not enough: of a round, its base's tensors, the updates' weighted mean, and the
updates themselves, each with its share of the weights. They are read once, one at a time, each gone when the next is there.

A function of its arguments whose bytes are the same on every machine: what it computes with is in `linalg`.
"""


class Program(Protocol):
    """How one round learns: what is uploaded, what a device computes, and what becomes of it."""

    @property
    def name(self) -> str:
        """As in `RoundOpened.strategy`; another way to compute is another name."""

    @property
    def kind(self) -> Literal["sums", "train"]:
        """What a list of rounds shows."""

    @property
    def combines(self) -> Literal["sum", "mean"] | Combine:
        """How the updates become one: the linear part of a merge, which `fedloop_server.aggregation` does, or a way of its own.

        Updates of different bases mix by their mean alone.
        """

    @property
    def from_base(self) -> bool:
        """Whether an update is a changed part of the base: what is bounded is then its distance from the base, else its norm."""

    def upload(self, release: Sequence[str]) -> list[str]:
        """The tensors of an update, of a release that has these."""

    def specs(self, opened: RoundOpened, base: Arrays) -> list[TensorSpec]:
        """What an update of the round holds, exactly. Raises `TensorError` if the base lacks what it rests on."""

    def smaller(self, opened: RoundOpened, base: Arrays) -> list[list[TensorSpec]]:
        """What an update may hold in its place, the largest first: of some tensors the first rows and columns, where the device
        trained no more. The rest is as it is in the base. None, unless the program can merge adapters of different ranks."""

    def largest(self, base: Arrays) -> Arrays:
        """A release as large as those of its rounds can become, of values that mean nothing."""

    def compute(self, model: Any, examples: Sequence[Any], opened: RoundOpened) -> dict[str, Array]:
        """A device's contribution: exactly the tensors `opened.upload`, float32. `model` holds the base release.

        Under a mechanism what comes out costs exactly that mechanism for one example more or less; there may be none at all.
        Raises `TermsError` for terms that cannot be followed, `TensorError` for a tensor that is not the model's.
        """

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        """The release that the combined updates make of the base: a function of its arguments, the same on every machine.

        A program that remembers something gives it tensors named as `STATE` says, and finds them in the next base.
        """


# --- the task ------------------------------------------------------------------------------------------------------------


class Step(Struct, frozen=True):
    """One release of a lineage, the round that made it of its base, and the updates that went in; the first has no round."""

    release: str
    base_release: str | None
    round_id: str | None
    strategy: str | None
    updates: list[str]
    """SHA-256 of the tensors of each update; "" of one without."""
    mechanism: Mechanism | None


class Provenance(Struct, frozen=True, kw_only=True):
    """Where a release comes from, as the log has it: what a model card is made of."""

    release: str
    model: str
    sha256: str
    """Of its tensors' blob."""
    metrics: dict[str, float] = {}
    """On the held-out set; none, if it was not evaluated."""
    steps: list[Step] = []
    """Newest first: the release itself, and back to the first one. None on a device, which reads no more of the log than concerns
    it: there nothing below is known, nor the metrics."""
    unprotected: list[str] = []
    """Rounds among them without differential privacy: if there is one, epsilon and delta mean nothing."""
    epsilon: float = 0.0
    """The most that these rounds cost one of the clients whose updates went in, at its `delta`."""
    delta: float = 0.0


class Streamed(Struct, frozen=True):
    """A file that is never in memory as a whole. Its chunks can be read once."""

    size_bytes: int
    chunks: Iterable[bytes | memoryview]


class Export(Struct, frozen=True):
    """A release as files by name, a model card among them, which programs that know nothing of this one load.

    `notes` say where they do another thing with them than a device does.
    """

    files: dict[str, bytes | Streamed]
    notes: list[str] = []


class Sample(Struct, frozen=True):
    """What a release answers to a held-out prompt, and what it should."""

    prompt: str
    answer: str
    wanted: str


class Verdict(Struct, frozen=True):
    """The gate's: `reason` is "" for a candidate that passes."""

    reason: str = ""
    detail: str = ""


class Task(Protocol):
    """What a model learns. The class makes a deployment's model, an object is the task of one model's spec."""

    plan: ClassVar[type[Plan]]
    """What the operator sets, and the rounds that follow from it."""
    base_model: ClassVar[str]
    """The base model, unless the operator names another one."""
    speaks: ClassVar[bool]
    """Whether the model answers in words of its own, as `Chats` does, not with one of a closed set."""
    files: ClassVar[Sequence[Option]]
    """What the command line takes to make a model; one of them is the held-out set."""
    remarks: ClassVar[Sequence[Option]]
    """What a user can give about a response beside thumb, rating, correction and comment: arguments of `Agent.feedback`, with a
    hyphen for each underscore."""
    metrics: ClassVar[Sequence[str]]
    """What its evaluations name, in letters, digits and underscores; the first one leads."""
    columns: ClassVar[Sequence[Option]]
    """What the command line takes to read files of messages whose columns have names of their own."""
    formats: ClassVar[Sequence[str]]
    """What its releases are exported as, unless something else is asked for as the first one."""

    def __init__(self, spec: Any) -> None: ...

    # --- making a model ---

    @classmethod
    def read(cls, path: Path, columns: Mapping[str, str | None] = {}) -> Messages:
        """A file of messages; `columns` are given by the names of the options. Raises `UsageError`."""

    @classmethod
    def material(cls, files: Mapping[str, Any], columns: Mapping[str, str | None] = {}) -> Material:
        """What the `files` hold, by the names of the options. Raises `UsageError`."""

    @classmethod
    def material_of(cls, messages: Messages, held_out: Messages) -> Material:
        """The same from messages to learn from and messages to measure with. Raises `UsageError` if they do not fit."""

    @classmethod
    def written(cls, messages: Sequence[Message]) -> str:
        """A file's text, of which `read` gives the messages again."""

    @classmethod
    def files_of(cls, material: Material) -> dict[str, str]:
        """Texts by file names, from which `material` gives the same again."""

    @classmethod
    def make(cls, material: Material, base_model: str, model_dir: Path | None, seed: int) -> tuple[Spec, dict[str, Array]]:
        """The spec of a model over a base on this machine, and its first release: the same bytes for the same seed.

        Raises `ModelError` if the base is not there.
        """

    @classmethod
    def remark(cls, answer: str) -> dict[str, Any]:
        """The feedback of a user who knows the right answer: arguments of `Agent.feedback`."""

    # --- one model ---

    def summary(self) -> dict[str, int]:
        """What is shown of a model that was made."""

    def check(self, arrays: Arrays) -> None:
        """Raises `UsageError` for a spec that describes no model, or tensors that cannot be its first release."""

    def keep(self, folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
        """Keep the held-out set in `folder`, unless that was done before; how many were left out, by reason.

        `mask` gives a text as devices see it, or None if it cannot.
        """

    def evaluator(self, folder: Path, model_dir: Path | None) -> Evaluate:
        """Evaluation on the held-out set in `folder`. Raises `UsageError` if there is none; the model is loaded when needed."""

    def samples(self, folder: Path, arrays: Arrays) -> list[Sample]:
        """Some answers that the evaluation of a release with these tensors has kept in `folder`, for people; none for a model
        whose answers say no more than its metrics, or where nothing was kept."""

    def gate(self, candidate: Measured, incumbent: Measured, margin: float) -> Verdict:
        """Whether a candidate may take the place of the release in force, both evaluated on the same held-out set: a function of
        its arguments. `gating.gate` will do."""

    def export(self, arrays: Arrays, provenance: Provenance, form: str, model_dir: Path | None) -> Export:
        """A release in one of the `formats`; where that needs the base model, it is checked by hash.

        Raises `TensorError` for tensors that are no release of the model, `ModelError` if the base is needed and not there.
        """

    @property
    def words(self) -> Sequence[str]:
        """The closed set of words that the model answers with: nobody's own, they are published as they are."""

    def taught(self, interaction: Interaction) -> str | None:
        """The answer that an interaction makes an example for by itself, if it does."""

    def examples(self, interactions: Iterable[Interaction]) -> Sequence[Any]:
        """What there is to learn from, oldest first: what its programs' `compute` takes. `interactions` are oldest first."""

    def model(self, model_dir: Path | None, scratch: Scratch | None = None, base_dtype: BaseDtype = "f32") -> Model:
        """The model on this machine, with its base checked by hash. Imports what it needs when called. Raises `ModelError`.

        `scratch` is for what it keeps of texts and has no room for in memory; a model that keeps little has no use for it.
        """

"""One device: what its agent, its loop and its instruction handler share, and where it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, UsageError
from fedloop_events.locations import DeploymentLocation, open_blobs, open_log
from fedloop_events.logs.port import EventLog
from fedloop_tasks import precision
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Task
from msgspec import Struct

from fedloop_clients.alone import runs
from fedloop_clients.cut_short import CutShort, cut_short
from fedloop_clients.device_view import DeviceView
from fedloop_clients.eligibility import HERE, Eligibility, Joined, Surroundings
from fedloop_clients.enrolment import Identity
from fedloop_clients.feedback import identifier
from fedloop_clients.interactions import Interactions
from fedloop_clients.models import Models
from fedloop_clients.outbox import Outbox
from fedloop_clients.personal import Personal, PersonalLayers
from fedloop_clients.places import Lazy, LazyLog
from fedloop_clients.releases import KeptReleases
from fedloop_clients.retracting import Retractions
from fedloop_clients.store import Store
from fedloop_clients.store_file import cannot_write
from fedloop_clients.uploads import Uploads
from fedloop_clients.usage import Usage

LONGEST_SUMMARY_S: Final = 24 * 3600
VIEW: Final = "following"
"""Name of the view's state in the store."""
_RANK: Final = "rank"


class Settings(Struct, frozen=True, kw_only=True):
    """How a device takes part.

    `heartbeat_s` is how often it reports that it is up, at times of its own; `eligibility` says when it may take part, and so
    bounds what a server can make it spend in a day; with fewer than `min_examples` it declines a round. It trains adapters of at
    most `rank`, and declines a round that takes no less. `model_dir` is where base models lie that this user has not added and
    that are no installed packages. `scratch_bytes` bounds what a language model puts beside the store, sealed, of what it
    computes of texts, as long as the process runs (None: see `Scratch`; 0: nothing). Each `summary_s` seconds in which it
    answered the device publishes how often and how fast (`usage.py`); with None it counts nothing.

    `use_case` is what the application is for: feedback and counts are published, and measured, under it. Several can share a
    model.
    `speech_model` is the folder of a Whisper model for faster-whisper, which feedback by audio and video needs.
    `remember` is whether what a user has corrected is answered as corrected at once (`remembering.py`).

    `base_dtype` is what a language model's frozen base is held in ("auto": bfloat16 for a large one where the machine computes
    with it, else float32). Raises `UsageError` for "nf4" without its package.
    """

    model: str = types.DEFAULT_MODEL
    use_case: str = types.DEFAULT_USE_CASE
    model_dir: Path | None = None
    base_dtype: BaseDtype = "auto"
    heartbeat_s: float = 30.0
    eligibility: Eligibility = Eligibility()
    min_examples: int = 1
    scratch_bytes: int | None = None
    rank: int | None = None
    summary_s: float | None = 3600.0
    remember: bool = True
    speech_model: Path | None = None

    def __post_init__(self) -> None:
        identifier("use_case", self.use_case)
        if self.summary_s is not None and not 1 <= self.summary_s <= LONGEST_SUMMARY_S:
            raise UsageError(
                f"an interval of {self.summary_s:g} s cannot be summarised",
                hint=f"give 1 to {LONGEST_SUMMARY_S:,} s, or None: then nothing is counted",
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"the highest rank that may be trained is {self.rank}", hint="give 1 or more")
        precision.check(self.base_dtype)


class Status(Struct, frozen=True):
    """Where a device stands.

    `waiting` pieces of feedback are not published yet, `failed` (by reason) could not be and stay on the device until the next
    run; `unsent` events are not in the log yet; `answers` counts instructions by outcome; `cut_short` are rounds that were
    paid for and not answered, as long as they hold the device up; `rank` is that of the adapters as the device trained them last,
    None before; `personal` is its personal layer; `problem` is why the loop cannot go on now, a disk that is full or read-only
    before all.
    """

    client_id: str
    release: str | None
    waiting: int
    published: int
    failed: dict[str, int]
    unsent: int
    examples: int
    answers: dict[str, int]
    spends: int
    epsilon_spent: float
    epsilon: float | None
    delta: float
    suspended: str | None
    cut_short: list[CutShort] = []
    rank: int | None = None
    personal: Personal | None = None
    problem: str = ""

    @property
    def settled(self) -> bool:
        """Whether all feedback that can be masked is in the log."""
        return not (self.waiting or self.unsent)


class Device:
    """The store of an enrolled device, and its deployment, of which nothing is opened before it is used."""

    def __init__(
        self, store: Store, identity: Identity, place: DeploymentLocation, settings: Settings, around: Surroundings = HERE
    ) -> None:
        self.around, self.joined = around, Joined(store)
        self.store, self.identity, self.settings = store, identity, settings
        self.log: EventLog = LazyLog(lambda: identity.introduced(open_log(place.log)))
        self._blobs = Lazy(lambda: identity.introduced(open_blobs(place.blobs)))
        self.releases = KeptReleases(store)
        self.view = DeviceView(identity.client_id, identity.server_key, store.kept(VIEW))
        self.interactions, self.retractions = Interactions(store), Retractions(store)
        self.usage = Usage(store, settings.use_case, settings.summary_s, around.clock)
        self.outbox = Outbox(store, identity.writer(self.log))
        self.uploads = Uploads(store)
        self.personal = PersonalLayers(store)
        scratch = Scratch(store.path.parent, settings.scratch_bytes)
        self.models = Models(settings.model_dir, scratch, settings.base_dtype)
        self._counted: tuple[object, int] = None, 0

    @property
    def blobs(self) -> BlobStore:
        """Raises `UsageError` if nothing names their place."""
        return self._blobs.get()

    @property
    def spec(self) -> types.Spec | None:
        """The device's model; None while the log that was read names none."""
        return self.view.releases.models.get(self.settings.model)

    @property
    def task(self) -> Task | None:
        """What the model learns; None while it is not known."""
        return None if self.spec is None else task_of(self.spec)

    def flush(self) -> int:
        """Append everything due, and put before it what it names; how many events that were. Raises what log and blobs raise."""
        sent = self.outbox.flush(self.log, lambda due: self.uploads.put(due, lambda: self.blobs))
        self.uploads.forget()
        return sent

    def keep(self, view: DeviceView) -> None:
        """Persist what a view has read, with how far it has read. Raises `SuspendedError`."""
        with self.store.transaction():
            self.outbox.reconcile(view.mine)
            for feedback_id in view.retracted:
                self.retractions.announced(feedback_id)
            for feedback_id in view.published:
                if not self.interactions.published(feedback_id):
                    self.retractions.published(feedback_id)
            self.store.keep(VIEW, view.to_state())
        view.mine.clear()
        view.published.clear()
        view.retracted.clear()
        view.changed = False

    def keep_release(self) -> None:
        """Persist the tensors of the release in force, unless they are. Raises what reading blobs raises."""
        model, release = self.settings.model, self.view.releases.current(self.settings.model)
        if release is not None and (spec := self.view.releases.models.get(model)) is not None:
            self.releases.keep(model, spec, release, self.blobs)

    def trained_at(self, rank: int) -> None:
        """Remember the rank of the adapters that were trained last."""
        self.store.keep(_RANK, str(rank).encode())

    def examples(self) -> Sequence[Any]:
        """What there is to learn from now."""
        return () if self.task is None else self.task.examples(self.interactions.judged())

    def count_examples(self) -> int:
        """How many examples there are. They are read again only when the store or the model has changed."""
        state = self.store.changes(), self.spec
        if self._counted[0] != state:
            self._counted = state, len(self.examples())
        return self._counted[1]

    def _personal(self) -> Personal | None:
        kept = self.releases.current(self.settings.model)
        if kept is None:
            return self.personal.current(None, None, "")
        try:
            return self.personal.current(kept.spec, lambda: tensors.decode(self.releases.tensors(kept.blob)), kept.blob.sha256)
        except BlobError:  # another release took its place meanwhile
            return self.personal.current(None, None, "")

    def status(self, problem: str = "") -> Status:
        """Where the device stands, as of what was read of the log."""
        me, counts, ledger = self.identity.client_id, self.interactions.counts(), self.view.ledger
        suspended, release = ledger.suspended(me), self.view.releases.current(self.settings.model)
        outcomes: dict[str, str] = dict(self.store.rows("SELECT instruction_id, outcome FROM answers"))
        spends, unwritable = len(ledger.spends(me)), cannot_write(self.store.path)
        return Status(
            client_id=me,
            release=release.release if release else None,
            waiting=counts.get("captured", 0),
            published=counts.get("published", 0),
            failed=self.interactions.failures(),
            unsent=self.outbox.unsent() + len(self.retractions.due()),
            examples=self.count_examples(),
            answers=dict(Counter(outcomes.values())),
            spends=spends,
            epsilon_spent=ledger.epsilon(me, self.identity.delta) if spends else 0.0,
            epsilon=self.identity.epsilon,
            delta=self.identity.delta,
            suspended=suspended.reason if suspended else None,
            cut_short=cut_short(self.view, self.identity, outcomes, runs=runs(self.store.path)),
            rank=None if (rank := self.store.kept(_RANK)) is None else int(rank),
            personal=self._personal(),
            problem=unwritable.message if unwritable else problem,
        )

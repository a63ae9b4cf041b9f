"""The device's agent, as an application sees it: predict, take feedback, run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, overload

from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation, check_blobs, is_url, locate, open_log
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Export, Task

from fedloop_clients import enrolment
from fedloop_clients.chatting import ChatResponse, ChatStream, Chatting
from fedloop_clients.conversations import check_answer, sampling, turns_of
from fedloop_clients.device import Device, Settings, Status
from fedloop_clients.eligibility import Conditions, Surroundings, of_platform
from fedloop_clients.enrolment import Identity, kept
from fedloop_clients.feedback import (
    MAX_TEXT_CHARS,
    Feedback,
    FeedbackInput,
    Response,
    Thumb,
    check_text,
    check_word,
    identifier,
    mended,
    with_text,
)
from fedloop_clients.feedback_links import DEFAULT_TTL_S, FeedbackLinks
from fedloop_clients.gate import Apps
from fedloop_clients.in_force import InForce, check_chats, check_predicts
from fedloop_clients.interactions import Named
from fedloop_clients.keys import KeySource
from fedloop_clients.loop import Loop
from fedloop_clients.masking import Masking, Masks
from fedloop_clients.media.files import File
from fedloop_clients.media.texts import Media, engines
from fedloop_clients.personal import Personalised
from fedloop_clients.refreshing import Refresher, refresh_now
from fedloop_clients.remembering import Memory
from fedloop_clients.retracting import Retraction
from fedloop_clients.store import Store
from fedloop_clients.store_file import NotWritableError, cannot_write
from fedloop_clients.usage import Timed

if TYPE_CHECKING:
    from fedloop_events.flower.messages import ClientAppCallable


DEFAULTS: Final = Settings()
Messages = Sequence[Mapping[str, str]]


class Agent:
    """One device: its encrypted store, and the deployment that it is a client of.

    `predict`, `chat` and `feedback` may be called from any thread, and from other processes than the one that runs, which is one
    at most. The model, the masker and Flower are loaded when they are first needed.

    Rounds of the deployment's model are answered with what users taught this device. Beside them it serves other Flower runs with
    any `ClientApp` (or callable like one): `apps` gives a run's own by the run's name, which then serves all instructions of that
    run, rounds among them; `app` serves the instructions of all other runs that belong to no round. What data an app trains
    on is its own business, and so is the noise that a round's mechanism asks for. The budget holds for everything: a device
    that has one declines what no mechanism covers.

    `settings.eligibility` are the owner's terms. `conditions` tells whether they hold now: an application knows more than
    the default, which goes by the platform; `clock` is the device's wall clock, which counts for hours of the day and for
    links.
    """

    def __init__(
        self,
        store: Store,
        identity: Identity,
        place: DeploymentLocation,
        *,
        app: ClientAppCallable | None = None,
        apps: Mapping[str, ClientAppCallable] | None = None,
        masker: Masks | None = None,
        settings: Settings = DEFAULTS,
        conditions: Callable[[], Conditions] = of_platform,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.identity, self.settings = identity, settings
        self._device = Device(store, identity, place, settings, Surroundings(conditions, clock))
        self._apps = Apps(dict(apps or {}), app)
        self.links = FeedbackLinks(store, identity.secret("link"), clock)
        self._masking = Masking(masker)
        self._reading = threading.Lock()
        self._refresher = Refresher(self._device, self._reading, beside=not is_url(place.log))
        self._in_force = InForce(self._device, self._refresher)
        self._media = engines(settings.speech_model)
        self._memory = Memory(store) if settings.remember else None
        self._chatting = Chatting(self._device.interactions, self._in_force.to_chat, self._memory, self._device.usage)

    @classmethod
    def enrol(
        cls,
        log: str | Path,
        store_dir: str | Path,
        *,
        blobs: str | Path | None = None,
        client_id: str | None = None,
        epsilon: float | None = 8.0,
        delta: float = 1e-5,
        key_from: KeySource = "auto",
        app: ClientAppCallable | None = None,
        apps: Mapping[str, ClientAppCallable] | None = None,
        masker: Masks | None = None,
        settings: Settings = DEFAULTS,
        conditions: Callable[[], Conditions] = of_platform,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Make this device a client of the deployment with this `log`, with a store in the folder `store_dir`.

        `log` and `blobs` are locations (`fedloop_events.locations`): a folder, a broker, a gateway; most logs name the place of
        the blobs. The device keeps them, and signs its requests to a gateway with its own key, which it shows nobody.
        `epsilon` and `delta` are its privacy budget for life; `epsilon` None allows rounds without differential privacy.
        `key_from` says where the store's key is kept. Called again with the same terms it ends what was interrupted.
        Raises `UsageError` (name taken, terms wrong), `StoreError`, `KeyUnavailableError`, `UnreachableError`.
        """
        place = locate(None, log, blobs)
        opened = open_log(place.log)
        try:
            store, identity = enrolment.enrol(
                opened,
                Path(store_dir),
                location=kept(log),
                blobs=None if blobs is None else kept(blobs, check_blobs),
                client_id=client_id,
                epsilon=epsilon,
                delta=delta,
                key_from=key_from,
            )
        finally:
            opened.close()
        agent = cls(
            store, identity, place, app=app, apps=apps, masker=masker, settings=settings, conditions=conditions, clock=clock
        )
        refresh_now(agent._device)
        return agent

    @classmethod
    def open(
        cls,
        store_dir: str | Path,
        log: str | Path | None = None,
        *,
        blobs: str | Path | None = None,
        app: ClientAppCallable | None = None,
        apps: Mapping[str, ClientAppCallable] | None = None,
        masker: Masks | None = None,
        settings: Settings = DEFAULTS,
        conditions: Callable[[], Conditions] = of_platform,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """The device whose store is in `store_dir`; `log` and `blobs` if the deployment has moved since it enrolled.

        It opens no connection. Raises `StoreError` (`WrongKeyError`), `KeyUnavailableError`, `UsageError`.
        """
        store, identity = enrolment.open_store(Path(store_dir))
        try:
            place = identity.place if log is None and blobs is None else locate(None, log or identity.location, blobs)
            return cls(
                store, identity, place, app=app, apps=apps, masker=masker, settings=settings, conditions=conditions, clock=clock
            )
        except BaseException:
            store.close()
            raise

    def predict(self, text: str) -> Response:
        """Answer `text` with the release in force and keep the response, so that feedback can name it.

        It needs no connection: the newest release whose tensors the device has answers, and only a device that has none waits.
        The model sees the masked text, as it does when it trains. Where a user of this device has named the label of this text,
        or of one much like it, that is the answer (`Response.remembered`), until the release answers that text so by itself. On a
        disk that is full it answers as well, and the response's `note` says that it could not be kept.

        Raises `UsageError` for a text that is empty, longer than `MAX_TEXT_CHARS` or not Unicode, or where no release is known
        yet; `ModelError` and `BlobError` if there is no model to be had.
        """
        timed = Timed()
        check_text("text", text, MAX_TEXT_CHARS)
        masked = self._masking.masked_or_none(text)
        seen = masked.text if masked else text
        with self._in_force.to_predict() as (model, release):
            words = task_of(release.spec).words
            [own], [confidence] = model.predict([seen])
            found = self._memory.label(model, release.blob.sha256, seen, own, words) if self._memory else None
        response_id, note, source = "", "", found.feedback_id if found else None
        try:
            with self._device.usage.answered(release.release, timed.seconds, masked.counts if masked else None):
                kept = self._device.interactions.respond(text, masked, own, release.release, words, remembered=source)
            response_id = kept  # not before it is on disk
        except NotWritableError as error:
            note = f"{error.message}, so no feedback can name this response"
        if found is not None:
            return Response(response_id, found.answer, found.similarity, release.release, note, remembered=True)
        return Response(response_id, own, confidence, release.release, note)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> ChatResponse: ...
    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> ChatStream: ...
    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> ChatResponse | ChatStream:
        """Answer the last of the `messages`, which is the user's, with the release in force, and keep the response, so that
        feedback can name it.

        A message is `{"role": "system" | "user" | "assistant", "content": TEXT}`; the system speaks first or not at all, then
        user and assistant take turns. The answer has at most `max_tokens` tokens (the model's own bound, if None), and no more
        than the model has room for. It is greedy, or at a `temperature` above 0 drawn, and then the same for the same `seed`; it
        ends before the first of the texts `stop` that it would hold. With `stream` the call returns when the answer begins, and
        what it returns gives its pieces. Unlike `predict` the model sees what was written, not what is left of it masked: nothing
        of it leaves the device but masked, and it learns from that
        alone. Answers are written one at a time, whichever thread asks. What a user of this device has corrected is answered as
        corrected when the same messages come again at temperature 0 (`ChatResponse.remembered`), until the release answers so by
        itself.

        On a disk that is full it answers as well, and the response's `note` says that it could not be kept. Raises, with nothing
        kept, `UsageError` for messages that are none or too long for the model, a model that answers with one of a closed set of
        words (`predict`), or where no release is known yet; `ModelError` and `BlobError` if there is no model to be had.
        """
        turns, how = turns_of(messages), sampling(max_tokens, temperature, seed, stop)
        return self._chatting.stream(turns, how) if stream else self._chatting.whole(turns, how)

    def embed(self, texts: Sequence[str]) -> Array:
        """The texts as the model's unit vectors, [n, d] float32; nothing is kept. The model sees what was written.

        A classifier's are of the release in force, a language model's of its base. Raises as `predict` does.
        """
        for text in texts:
            check_text("text", text, MAX_TEXT_CHARS)
        with self._in_force.to_embed() as (model, _):
            return model.embed(texts)

    def record_answer(
        self, messages: Messages, answer: str, *, response_id: str | None = None, took_s: float | None = None
    ) -> ChatResponse:
        """Keep an answer that was made elsewhere, in `took_s` seconds, as if the release in force had made it: see `chat` and
        `record`.

        Raises `UsageError`.
        """
        turns, (spec, release) = turns_of(messages), self._in_force.named()
        check_answer(answer)
        check_chats(spec)
        kept = self._own_id("response", response_id)
        with self._device.usage.answered(release.release, took_s):
            kept = self._device.interactions.answer(turns, answer, release.release, kept)
        return ChatResponse(kept, release.release, answer, 1.0, finished=True, prompt_tokens=0, tokens=0)

    def record(self, text: str, label: str, *, response: str | None = None, response_id: str | None = None) -> Response:
        """Keep a response that was made elsewhere, as if the release in force had made it. Raises `UsageError`.

        `response` is what the user was shown, where that is more than the label. It is masked like the text, and not published.
        Nor is a `response_id` of the caller's: the response has an id that is derived from it with the device's key.
        """
        spec, release = self._in_force.named()
        check_predicts(spec)
        words = task_of(spec).words
        label, response_id = check_word("label", label, words), self._own_id("response", response_id)
        with self._device.usage.answered(release.release, None):
            response_id = self._device.interactions.respond(
                text, None, label, release.release, words, response=response, response_id=response_id
            )
        return Response(response_id, label, 1.0, release.release)

    def feedback(
        self,
        response_id: str,
        *,
        thumb: Thumb | None = None,
        rating: int | None = None,
        label: str | None = None,
        correction: str | None = None,
        comment: str | None = None,
        preferred_over: str | None = None,
        signal: str | None = None,
        audio: File | None = None,
        image: File | None = None,
        video: File | None = None,
        feedback_id: str | None = None,
    ) -> Feedback:
        """Record what the user did about a response; it is on disk when this returns, and needs no connection.

        At least one of: `thumb` "up" or "down", `rating` 1 to 5, the right `label`, a `correction` (the better answer) or a
        `comment` in the user's own words, another response to the same prompt that this one was `preferred_over`, or a `signal`,
        a word of the application's for what its user did: "copied", "clicked", "regenerated", "abandoned" and "escalated" mean
        the same to all who read the log. `feedback_id` is the caller's: the same one again is the same feedback, with other
        content an error. It stays here: the feedback has an id derived from it with the device's
        key, which is returned and published, and may be given in its place. What the user wrote leaves the device masked or not
        at all. A correction or comment that cannot be kept as it is does not stop the rest: the `note` of what is returned says
        what was left out or mended.

        What is said in `audio`, written in an `image`, and both in a `video` (paths, or a file's bytes) is read on the device, in
        seconds, and stands below the comment, masked like it; the file itself is not kept. It takes the extras `audio` and
        `image`, and `Settings.speech_model`.

        Raises `UnknownResponseError`, `ConflictingFeedbackError` (`RetractedFeedbackError` for what was taken back), and
        `UsageError` for what cannot be meant.
        """
        if not (response_id and preferred_over != ""):
            raise cannot_write(self._device.store.path) or UsageError(
                "this response was not kept, because the disk was full", hint="ask again, now that there is room"
            )
        worse = self._own_id("response", preferred_over)
        given, note = mended(FeedbackInput(thumb, rating, label, correction, comment, worse, signal))
        media = Media(audio, image, video)
        if media != Media():
            given, note = with_text(given, self._media.of(media), note)
        if self._device.spec is None:
            self._refresher.refresh_first()
        task = self._device.task
        if label is not None and task is not None and task.speaks:
            raise UsageError(
                "this model answers in its own words, so no label is right", hint="give the better answer as correction"
            )
        words, feedback_id = task.words if task else (), self._own_id("feedback", feedback_id)
        response_id = self._own_id("response", response_id)
        feedback_id, recorded = self._device.interactions.record(response_id, given, words, feedback_id)
        taught = None if task is None else given.correction if task.speaks else task.taught(recorded)
        return Feedback(feedback_id, response_id, taught, note)

    def personalise(self) -> Personalised:
        """Train a personal layer on this device's own feedback, on top of the release that answers: from then on `chat` answers
        with both. It takes seconds to minutes, and the place of an earlier layer.

        It is trained without differential privacy and never leaves the device: no round, evaluation or export ever sees it. It is
        kept, in the encrypted store, only if the loss on examples that it was not trained with falls; else the release answers
        alone. It acts on later releases too, as long as they have the same A factors. Taking back feedback that it may have been
        trained on deletes it. Raises `UsageError` for a model that does not chat, too few examples, or feedback that was taken
        back meanwhile; `ModelError` and `BlobError` if there is no model to be had.
        """
        return self._in_force.personalised()

    def forget_personal(self) -> bool:
        """Delete the personal layer; whether there was one."""
        return self._device.personal.forget()

    def feedback_url(self, response_id: str, *, ttl: float = DEFAULT_TTL_S) -> str:
        """A link that opens a page for feedback on the response, of this device's sidecar, without its key, for `ttl` seconds.

        The page opens as often as it is asked for; feedback is taken from it once, and the same again counts once. The link holds
        nothing but the response's id, when it expires, and a signature. Raises `UnknownResponseError`, and `UsageError` for a
        time that a link cannot hold, or as long as no sidecar has served this device.
        """
        return self.links.url(self._own_id("response", response_id), ttl)

    @property
    def task(self) -> Task:
        """What the deployment's model learns. Raises `UsageError` as long as the device knows no model."""
        if self._device.spec is None:
            self._refresher.refresh_first()
        if (task := self._device.task) is None:
            raise self._in_force.none()
        return task

    @property
    def release(self) -> str:
        """The release that answers: the newest whose tensors this device has. Raises `UsageError` as long as there is none."""
        return self._in_force.kept().release

    def export(self, form: str) -> tuple[str, Export]:
        """The release that answers, and its files for other programs, in one of the formats of `task`, for a model that chats.

        The card among them tells nothing of evaluation, rounds and privacy: devices do not read what it takes. Raises
        `UsageError`, `ModelError` for a base model that is needed and not there, `BlobError`.
        """
        return self._in_force.exported(form)

    def knows(self, feedback_id: str) -> bool:
        """Whether feedback with this id is in the store."""
        return self._device.interactions.knows("feedback", self._own_id("feedback", feedback_id))

    def retract(self, feedback_id: str) -> Retraction:
        """Take feedback back: when this returns, no round of this device learns from it any more. It needs no connection.

        The feedback, its texts, and each response that no other feedback is about are deleted from the store; the id is kept, and
        feedback under it is refused for ever. Of what was never published nothing ever is. What is in the log, or on its way
        there, is followed by a `FeedbackRetracted`, which holds the id alone, when the agent runs. Retracting again changes
        nothing.

        What it cannot undo: the masked text stays in the log until its retention ends, and a round that learned from the example
        before keeps that: its epsilon is spent, and its release is merged.

        Raises `UnknownFeedbackError`.
        """
        return self._device.retractions.retract(self._own_id("feedback", feedback_id))

    def run(self, stop: threading.Event | None = None, until: Callable[[Status], bool] | None = None) -> None:
        """Mask and publish feedback, and take part in rounds, until `stop` is set or `until` is true of the status.

        Goes on where a process that was killed has stopped. An unreachable log is waited for, and so is room on a disk that fills
        up meanwhile; what is due stays in the store. On a disk that is full from the start it raises `NotWritableError`.
        Raises `UnreachableError` if another process runs this device, `PolicyError` if the device may take no part any more
        (`SuspendedError`, `RevokedError`, `LogChangedError`).
        """
        loop = Loop(self._device, self._apps, self._masking.together, self._reading)
        with self._reading:
            self._refresher.running += 1
        try:
            loop.run(stop or threading.Event(), until)
        finally:
            with self._reading:
                self._refresher.running -= 1

    def status(self) -> Status:
        """Where the device stands, as of what it has read; a log that answers at once is read first."""
        self._refresher.refresh()
        return self._device.status()

    def close(self) -> None:
        """Let go of the store and the log; nothing is lost."""
        self._chatting.close()
        self._device.log.close()
        self._device.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @overload
    def _own_id(self, kind: Named, given: str) -> str: ...
    @overload
    def _own_id(self, kind: Named, given: str | None) -> str | None: ...
    def _own_id(self, kind: Named, given: str | None) -> str | None:
        """The id in the store of what a caller names: that id, or the one that is derived from it. Raises `UsageError`."""
        if given is None or self._device.interactions.knows(kind, identifier(f"{kind}_id", given)):
            return given
        return self.identity.derived_id(kind, given)

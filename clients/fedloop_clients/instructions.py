"""Answering an instruction: the privacy gate, the spend, the `ClientApp`, and the reply, in an order no crash can turn around.

1. The gate decides from the log alone, before any data is touched; a refusal is an event with a stable code.
2. `BudgetSpent` is appended and read back as the entry that counts. From here on the budget is spent, whatever happens.
3. The `ClientApp` runs. Its tensors go into the blob store.
4. The reply, the Flower context and the mark "answered" become durable in one transaction; then the outbox sends the reply.

Killed before 2, the device starts over. Killed between 2 and 4, it has no result that it could send, and a second run would be
a second release of the same data: it declines ("interrupted"). Killed after 4, it sends what it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from fedloop_events import types
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.errors import BlobError, TensorError, UnreachableError
from fedloop_events.flower.messages import Declined, new_context, pack_state, run_number, serve_instruction, unpack_state
from fedloop_events.logs.port import EventLog
from fedloop_privacy.accounting import MechanismError, validate
from flwr.app import Context, Message

from fedloop_clients.device_view import DeviceView, Instruction
from fedloop_clients.enrolment import Identity
from fedloop_clients.outbox import Outbox, SuspendedError
from fedloop_clients.store import Store

MAX_DOWNLOAD_BYTES: Final = 4 << 30
READ_BACK_TIMEOUT_S: Final = 30.0
"""How long a log may take to show what it has acknowledged; one that is read where it is written takes no time at all."""
_DAY_MS: Final = 24 * 3600 * 1000

Opened = types.RoundOpened | None


class App(Protocol):
    """A Flower `ClientApp`, and whether the device can serve it now."""

    def unready(self, opened: Opened) -> str | None:
        """A stable code for why there is nothing to run the app on, or None. It is asked before anything is spent."""

    def __call__(self, message: Message, context: Context) -> Message: ...


class _Later(Exception):  # noqa: N818 (a decision, not an error)
    """The instruction cannot be answered yet: what it needs is still on its way."""


class _Decline(NamedTuple):
    reason: str
    detail: str = ""
    would_be_epsilon: float | None = None


class InstructionHandler:
    """Answers the instructions that `following` finds in `log`, one at a time.

    `catch_up` reads the log to its end after waiting up to so many seconds for a first event; it raises `SuspendedError`.
    """

    def __init__(
        self,
        identity: Identity,
        store: Store,
        outbox: Outbox,
        following: DeviceView,
        log: EventLog,
        reader: TensorReader,
        app: App,
        *,
        catch_up: Callable[[float], None],
        rounds_per_day: int,
    ) -> None:
        self._identity, self._store, self._outbox = identity, store, outbox
        self._following, self._log, self._reader, self._app = following, log, reader, app
        self._catch_up, self._rounds_per_day = catch_up, rounds_per_day
        self._first_seen: dict[str, float] = {}

    def due(self) -> list[Instruction]:
        """Instructions that are not answered, oldest first."""
        waiting = self._following.instructions
        self._first_seen = {event_id: self._first_seen.get(event_id, time.monotonic()) for event_id in waiting}
        return [each for each in waiting.values() if not self._answered(each.event_id)]

    def answer(self, instruction: Instruction) -> None:
        """Answer it, decline it, let it pass if it is too late, or leave it due if what it needs is still on its way.

        The answer is in the outbox when this returns. Raises `SuspendedError`, and what log and blobs raise.
        """
        sent = instruction.sent
        opened = self._following.rounds.get(sent.round_id) if sent.round_id is not None else None
        if self._too_late(instruction, opened):
            self._settle(instruction, "late")
            return
        try:
            refused = self._refusal(instruction, opened)
        except _Later:
            return
        refused = refused or self._serve(instruction, opened)
        if refused is not None:
            self._decline(instruction, refused)

    # --- the gate ---

    def _too_late(self, instruction: Instruction, opened: Opened) -> bool:
        """By the log's own clock, and by how long this process has known it: the device's wall clock decides nothing."""
        sent = instruction.sent
        if sent.round_id is not None and opened is None:
            return True  # closed, aborted, or opened by a server that was fenced
        known_s = time.monotonic() - self._first_seen.get(instruction.event_id, time.monotonic())
        age_s = max((self._following.newest_ms - instruction.record.appended_ms) / 1000, known_s)
        return age_s > (min(sent.ttl_s, opened.deadline_s) if opened else sent.ttl_s)

    def _refusal(self, instruction: Instruction, opened: Opened) -> _Decline | None:
        sent, mechanism = instruction.sent, opened.mechanism if opened else None
        if instruction.event_id in self._following.spent:
            return _Decline("interrupted")
        if mechanism is None and self._identity.epsilon is not None:
            return _Decline("not-private")
        if mechanism is not None and sent.message_type.partition(".")[0] != "train":
            return _Decline("not-private", "the mechanism of a round pays for training alone")
        if opened is not None and (wrong := self._wrong_base(sent, opened)):
            return _Decline(wrong)
        if unready := self._app.unready(opened):
            return _Decline(unready)
        if mechanism is not None and (over := self._over_budget(mechanism)):
            return over
        return self._unreadable(sent)

    def _wrong_base(self, sent: types.InstructionSent, opened: types.RoundOpened) -> str | None:
        """A device trains only on a release that the log has published, the same one for the whole round."""
        if self._identity.client_id not in opened.cohort:
            return "not-in-cohort"
        release = self._following.releases.releases.get(opened.base_release)
        if release is None:
            raise _Later
        same = release.blob == opened.base and all(ref == opened.base for ref in sent.content.arrays.values())
        return None if same and release.status == "published" and release.model == opened.model else "wrong-base"

    def _over_budget(self, mechanism: types.Mechanism) -> _Decline | None:
        me, since_ms = self._identity, self._following.newest_ms - _DAY_MS
        if sum(each.appended_ms > since_ms for each in self._following.spent.values()) >= self._rounds_per_day:
            return _Decline("too-many-rounds", f"at most {self._rounds_per_day} a day")
        try:
            over = self._following.ledger.check(me.client_id, validate(mechanism), me.epsilon, me.delta)
        except MechanismError:
            return _Decline("bad-mechanism")
        return None if over is None else _Decline(over.reason, over.detail, over.would_be_epsilon)

    def _unreadable(self, sent: types.InstructionSent) -> _Decline | None:
        """Before anything is spent: an instruction whose tensors are not there cannot be followed."""
        if sum(ref.size_bytes for ref in sent.content.arrays.values()) > MAX_DOWNLOAD_BYTES:
            return _Decline("too-large")
        try:
            for ref in sent.content.arrays.values():
                self._reader.tensors(ref)
        except TensorError:
            return _Decline("wrong-base", "no tensors")
        except BlobError as error:
            raise _Later from error
        return None

    # --- the work ---

    def _serve(self, instruction: Instruction, opened: Opened) -> _Decline | None:
        sent = instruction.sent
        spend_seq = self._spend(instruction, opened, opened.mechanism) if opened and opened.mechanism else None
        context = self._context(sent.run_id)
        try:
            answer = serve_instruction(self._app, instruction.record, sent, context, self._reader, terms=opened)
            if isinstance(answer, Declined):
                return _Decline("client-error", f"{answer.reason} {answer.detail}".strip())
            self._submit(instruction, opened, answer if spend_seq is None else _paid_for(answer), spend_seq, context)
        except UnreachableError:
            raise
        except Exception as error:  # whatever an app gives back that is no answer; its text could hold anything
            return _Decline("client-error", type(error).__name__)
        return None

    def _spend(self, instruction: Instruction, opened: types.RoundOpened, mechanism: types.Mechanism) -> int:
        """Append `BudgetSpent` and read the ledger back; the number of the spend. Only then may data be touched."""
        me, ledger = self._identity, self._following.ledger
        spent = self._outbox.add(
            lambda seq: ledger.next_spend(
                me.client_id,
                mechanism,
                origin=me.origin,
                seq=seq,
                run_id=instruction.sent.run_id,
                instruction_id=instruction.event_id,
                round_id=opened.round_id,
            )
        )
        self._outbox.flush(self._log)
        deadline = time.monotonic() + READ_BACK_TIMEOUT_S
        while instruction.event_id not in self._following.spent:
            if time.monotonic() > deadline:
                raise UnreachableError(f"the log does not show event {spent.id}, which it has acknowledged")
            self._catch_up(1.0)
        counts = self._following.spent[instruction.event_id]
        if counts.event_id != spent.id or ledger.suspended(me.client_id) is not None:
            raise SuspendedError(
                f"another copy of this device has spent budget for instruction {instruction.event_id}",
                hint="revoke this client and enrol the device under a new name, with a new store",
            )
        return counts.spend_seq

    def _context(self, run_id: str) -> Context:
        context = new_context(run_number(self._identity.origin, run_id), self._identity.node_id)
        for (state,) in self._store.rows("SELECT state FROM contexts WHERE run_id = ?", (run_id,)):
            unpack_state(context, bytes(state))
        return context

    def _submit(
        self, instruction: Instruction, opened: Opened, content: types.Content, spend_seq: int | None, context: Context
    ) -> None:
        sent = instruction.sent
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO contexts VALUES (?, ?) ON CONFLICT (run_id) DO UPDATE SET state = excluded.state",
                (sent.run_id, pack_state(context)),
            )
            self._outbox.add(
                lambda seq: types.UpdateSubmitted(
                    origin=self._identity.origin,
                    client_id=self._identity.client_id,
                    seq=seq,
                    run_id=sent.run_id,
                    instruction_id=instruction.event_id,
                    content=content,
                    round_id=sent.round_id,
                    base_release=opened.base_release if opened else None,
                    mechanism=opened.mechanism if opened else None,
                    spend_seq=spend_seq,
                )
            )
            self._settle(instruction, "submitted")

    def _decline(self, instruction: Instruction, refused: _Decline) -> None:
        origin, client_id, sent = self._identity.origin, self._identity.client_id, instruction.sent
        with self._store.transaction():
            if (would_be := refused.would_be_epsilon) is not None:
                self._outbox.add(
                    lambda seq: types.BudgetRefused(
                        origin=origin,
                        client_id=client_id,
                        seq=seq,
                        run_id=sent.run_id,
                        instruction_id=instruction.event_id,
                        reason=refused.reason,
                        budget_epsilon=self._identity.epsilon,
                        would_be_epsilon=would_be if would_be < float("inf") else None,
                        round_id=sent.round_id,
                    )
                )
            self._outbox.add(
                lambda seq: types.RoundDeclined(
                    origin=origin,
                    client_id=client_id,
                    seq=seq,
                    run_id=sent.run_id,
                    instruction_id=instruction.event_id,
                    reason=refused.reason,
                    detail=refused.detail[:200],
                    round_id=sent.round_id,
                )
            )
            self._settle(instruction, refused.reason)

    def _answered(self, instruction_id: str) -> bool:
        return bool(self._store.rows("SELECT 1 FROM answers WHERE instruction_id = ?", (instruction_id,)))

    def _settle(self, instruction: Instruction, outcome: str) -> None:
        with self._store.transaction() as db:
            db.execute("INSERT INTO answers VALUES (?, ?)", (instruction.event_id, outcome))


def _paid_for(content: types.Content) -> types.Content:
    """What the mechanism covers: tensors. Losses, counts and times are private, so only the constant weight stays."""
    weights: dict[str, dict[str, types.Metric]] = {
        name: {"num-examples": 1} for name, metrics in content.metrics.items() if "num-examples" in metrics
    }
    return types.Content(arrays=content.arrays, metrics=weights)

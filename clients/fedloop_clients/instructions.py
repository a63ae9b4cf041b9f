"""Answering an instruction: the privacy gate, the spend, the work, and the reply, in an order no crash can turn around.

1. The gate decides by the log and the owner's terms, before any data is touched; a refusal is an event with a stable code.
2. `BudgetSpent` is appended and read back as the entry that counts. From here on the budget is spent, whatever happens.
3. A round's program runs, or the `ClientApp` of another Flower run. The tensors go into the blob store.
4. The reply, its tensors, the Flower context and the mark "answered" become durable in one transaction; then the outbox sends
   the reply, after putting its tensors once more if the store has let go of them meanwhile.

Killed before 2, the device starts over. Killed between 2 and 4, it has no result that it could send, and a second run would be
a second release of the same data: it declines ("interrupted"). Killed after 4, it sends what it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.errors import UnreachableError
from fedloop_tasks import updates
from fedloop_tasks.table import program_of

from fedloop_clients.device import Device
from fedloop_clients.device_view import Instruction
from fedloop_clients.gate import Apps, Decline, Gate, NotYet, Opened
from fedloop_clients.outbox import ENROL_ANEW, SuspendedError
from fedloop_clients.ranks import rank_for
from fedloop_clients.store_file import NotWritableError
from fedloop_clients.uploads import Recorder

if TYPE_CHECKING:
    from fedloop_events.flower.messages import ClientAppCallable

READ_BACK_TIMEOUT_S: Final = 30.0
"""How long a log may take to show what it has acknowledged; one that is read where it is written takes no time at all."""
_ARRAYS: Final = "arrays"
_METRICS: Final = "metrics"
_WEIGHT: Final = "num-examples"
"""The names that Flower's own strategies look for, and the server for rounds."""


class _Work(NamedTuple):
    """An answer, and the state of the run's Flower context after it, if there is one."""

    content: types.Content
    state: bytes | None = None


class InstructionHandler:
    """Answers the instructions in the device's view, one at a time: rounds with the task, what is for an app with the app.

    `catch_up` reads the log to its end after waiting up to so many seconds for a first event; it raises `SuspendedError`.
    """

    def __init__(self, device: Device, apps: Apps, catch_up: Callable[[float], None]) -> None:
        self._device, self._apps, self._catch_up = device, apps, catch_up
        self._reader = TensorReader(device.blobs, keep_bytes=0)
        self._gate = Gate(device, apps, self._reader)
        self._first_seen: dict[str, float] = {}

    def due(self) -> list[Instruction]:
        """Instructions that are not answered, oldest first."""
        waiting = self._device.view.instructions
        self._first_seen = {event_id: self._first_seen.get(event_id, time.monotonic()) for event_id in waiting}
        return [each for each in waiting.values() if not self._answered(each.event_id)]

    def answer(self, instruction: Instruction) -> None:
        """Answer it, decline it, let it pass if it is too late, or leave it due if what it needs is still on its way.

        The answer is in the outbox when this returns. Raises `SuspendedError`, and what log and blobs raise.
        """
        sent = instruction.sent
        opened = self._device.view.rounds.get(sent.round_id) if sent.round_id is not None else None
        if self._gate.too_late(instruction, opened, time.monotonic() - self._first_seen[instruction.event_id]):
            self._settle(instruction, "late")
            return
        try:
            refused = self._gate.refusal(instruction, opened)
        except NotYet:
            return
        refused = refused or self._serve(instruction, opened)
        if refused is not None:
            self._decline(instruction, refused)

    def _serve(self, instruction: Instruction, opened: Opened) -> Decline | None:
        self._device.store.check_writable()  # an answer that could not be kept would have been paid for in vain
        if opened is not None:
            self._device.joined.add(opened, instruction.record.appended_ms)
        spend_seq = self._spend(instruction, opened, opened.mechanism) if opened and opened.mechanism else None
        app, made = self._apps.serving(instruction.sent), Recorder(self._device.blobs)
        try:
            if app is not None:
                work = self._call(app, instruction, opened, made)
            else:
                assert opened is not None  # or the gate would have declined
                work = self._contribute(opened, made)
            if isinstance(work, Decline):
                return work
            self._submit(instruction, opened, work, spend_seq, made)
        except (UnreachableError, NotWritableError):
            raise
        except Exception as error:  # whatever an app gives back that is no answer; its text could hold anything
            return Decline("client-error", type(error).__name__)
        return None

    def _contribute(self, opened: types.RoundOpened, made: Recorder) -> _Work:
        """What the round's program computes from the base release and the examples of this moment.

        Under a mechanism the tensors alone depend on the examples: counts are private, and every client weighs the same.
        """
        device, base = self._device, self._reader.tensors(opened.base)
        assert device.spec is not None
        examples = device.examples()
        with device.models.borrowed(device.spec) as held, held.holding(base) as model:
            rank = rank_for(model, opened, base, device.settings.rank)
            with model.at_rank(rank):
                trained = program_of(opened.strategy).compute(model, examples, opened)
        if program_of(opened.strategy).kind == "train":
            device.trained_at(rank)
        ref = made.put(tensors.encode(updates.encode(opened, base, trained)))
        weight = 1 if opened.mechanism is not None else len(examples)
        return _Work(types.Content(arrays={_ARRAYS: ref}, metrics={_METRICS: {_WEIGHT: weight}}))

    def _call(self, app: ClientAppCallable, instruction: Instruction, opened: Opened, made: Recorder) -> _Work | Decline:
        """What the app makes of the message; the terms of a round are in it. Whether there is data is the app's business."""
        from fedloop_events.flower import messages

        run_id, me = instruction.sent.run_id, self._device.identity
        context = messages.new_context(messages.run_number(me.origin, run_id), me.node_id)
        for (state,) in self._device.store.rows("SELECT state FROM contexts WHERE run_id = ?", (run_id,)):
            messages.unpack_state(context, bytes(state))
        answer = messages.serve_instruction(
            app, instruction.record, instruction.sent, context, self._reader, terms=opened, blobs=made
        )
        if isinstance(answer, messages.Declined):
            return Decline("client-error", f"{answer.reason} {answer.detail}".strip())
        paid = opened is not None and opened.mechanism is not None
        return _Work(_paid_for(answer) if paid else answer, messages.pack_state(context))

    def _spend(self, instruction: Instruction, opened: types.RoundOpened, mechanism: types.Mechanism) -> int:
        """Append `BudgetSpent` and read the ledger back; the number of the spend. Only then may data be touched."""
        me, ledger = self._device.identity, self._device.view.ledger
        spent = self._device.outbox.add(
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
        self._device.flush()
        deadline = time.monotonic() + READ_BACK_TIMEOUT_S
        while instruction.event_id not in self._device.view.spent:
            if time.monotonic() > deadline:
                raise UnreachableError(f"the log does not show event {spent.id}, which it has acknowledged")
            self._catch_up(1.0)
        counts = self._device.view.spent[instruction.event_id]
        if counts.event_id != spent.id or ledger.suspended(me.client_id) is not None:
            raise SuspendedError(
                f"another copy of this device has spent budget for instruction {instruction.event_id}",
                hint=ENROL_ANEW,
            )
        return counts.spend_seq

    def _submit(self, instruction: Instruction, opened: Opened, work: _Work, spend_seq: int | None, made: Recorder) -> None:
        sent, me = instruction.sent, self._device.identity
        with self._device.store.transaction() as db:
            if work.state is not None:
                db.execute(
                    "INSERT INTO contexts VALUES (?, ?) ON CONFLICT (run_id) DO UPDATE SET state = excluded.state",
                    (sent.run_id, work.state),
                )
            self._device.outbox.add(
                lambda seq: types.UpdateSubmitted(
                    origin=me.origin,
                    client_id=me.client_id,
                    seq=seq,
                    run_id=sent.run_id,
                    instruction_id=instruction.event_id,
                    content=work.content,
                    round_id=sent.round_id,
                    base_release=opened.base_release if opened else None,
                    mechanism=opened.mechanism if opened else None,
                    spend_seq=spend_seq,
                )
            )
            self._device.uploads.keep(work.content, made)
            self._settle(instruction, "submitted")

    def _decline(self, instruction: Instruction, refused: Decline) -> None:
        origin, client_id, sent = self._device.identity.origin, self._device.identity.client_id, instruction.sent
        with self._device.store.transaction():
            if (would_be := refused.would_be_epsilon) is not None:
                self._device.outbox.add(
                    lambda seq: types.BudgetRefused(
                        origin=origin,
                        client_id=client_id,
                        seq=seq,
                        run_id=sent.run_id,
                        instruction_id=instruction.event_id,
                        reason=refused.reason,
                        budget_epsilon=self._device.identity.epsilon,
                        would_be_epsilon=would_be if would_be < float("inf") else None,
                        round_id=sent.round_id,
                    )
                )
            self._device.outbox.add(
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
        return bool(self._device.store.rows("SELECT 1 FROM answers WHERE instruction_id = ?", (instruction_id,)))

    def _settle(self, instruction: Instruction, outcome: str) -> None:
        with self._device.store.transaction() as db:
            db.execute("INSERT INTO answers VALUES (?, ?)", (instruction.event_id, outcome))


def _paid_for(content: types.Content) -> types.Content:
    """What the mechanism covers: tensors. Losses, counts and times are private, so only the constant weight stays."""
    weights: dict[str, dict[str, types.Metric]] = {
        name: {_WEIGHT: 1} for name, metrics in content.metrics.items() if _WEIGHT in metrics
    }
    return types.Content(arrays=content.arrays, metrics=weights)

"""Collecting the replies to the instructions of one step: which of them count, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import fedloop_tasks.updates as updates
import msgspec
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.errors import LogError
from fedloop_events.types import AcceptedUpdate, Exclusion, InstructionSent, RoundDeclined, RoundOpened, UpdateSubmitted
from fedloop_tasks.table import program_of
from numpy.typing import NDArray

from fedloop_server.flower.admission import (
    BLOB_ABSENT,
    DUPLICATE,
    INCONSISTENT,
    NOT_ADDRESSED,
    Admission,
    ExpectedReply,
    UpdateRefusal,
    inconsistent,
)
from fedloop_server.flower.steps import Decision, Reply, RunSteps

SILENT: Final = "silent"
"""Who did not answer until the deadline."""
SLOW: Final = "slow"
"""Who did not answer while the round went on after its quorum."""
NOT_NEEDED: Final = "not-needed"
"""Who had not answered when the round had enough."""


class Collection:
    """The replies to `sent` (by instruction), judged as `steps` learns of them.

    The first reply of the addressed client settles its instruction, accepted or not; what was refused once stays refused.
    `known_specs` says what blobs of instructions hold, by hash, where that is known without reading them.
    """

    def __init__(
        self,
        steps: RunSteps,
        sent: Mapping[str, Decision],
        opened: RoundOpened | None,
        admission: Admission,
        reader: TensorReader,
        known_specs: Mapping[str, Sequence[TensorSpec]],
    ) -> None:
        self.sent = sent
        pairs = [(decision, _sent(decision)) for decision in sent.values()]
        self.in_order: Final = sorted(pairs, key=lambda pair: pair[1].step)
        """What was sent, by step."""
        self.sent_ms = max((decision.appended_ms for decision in sent.values()), default=0)
        """When the last instruction was sent, by the log's clock."""
        self.waits_for_blobs = False
        self._steps, self._opened, self._admission, self._reader = steps, opened, admission, reader
        self._known_specs = known_specs
        self._accepted: dict[str, Reply] = {}
        self._excluded: dict[str, Exclusion] = {}
        self._refusals: list[tuple[Reply, UpdateRefusal]] = []
        self._base_arrays: Mapping[str, NDArray[Any]] | None = None
        self._smaller_specs: Sequence[Sequence[TensorSpec]] | None = None

    @property
    def complete(self) -> bool:
        """Whether every instruction is settled."""
        return len(self._accepted) + len(self._excluded) == len(self.sent)

    @property
    def accepted_ms(self) -> list[int]:
        """When the replies came that are accepted."""
        return [each.appended_ms for each in self._accepted.values()]

    def judge(self) -> None:
        """Settle what can be settled with the replies that have been read so far."""
        self.waits_for_blobs = False
        for decision, sent in self._open():
            self._judge(decision.id, sent, decision)

    def close(self, *, final: bool, missing: str = SILENT) -> tuple[list[AcceptedUpdate], list[Exclusion]]:
        """What counts, sorted by step, and what does not. `final` settles what is still open: as `missing`, or as refused."""
        if final:
            for decision, sent in self._open():
                self._give_up(decision.id, sent.client_id, missing)
        if self._opened is None:
            self._drop_inconsistent()
        self._note_duplicates()
        order = [decision.id for decision, _ in self.in_order]
        accepted = [self._accept(each, self._accepted[each]) for each in order if each in self._accepted]
        return accepted, [self._excluded[each] for each in order if each in self._excluded]

    def take_refusals(self) -> list[tuple[Reply, UpdateRefusal]]:
        """The refusals since the last call that are not in the log."""
        taken, self._refusals = self._refusals, []
        return taken

    def update(self, accepted: AcceptedUpdate) -> UpdateSubmitted:
        """The reply that counts."""
        for reply in self._steps.replies.get(accepted.instruction_id, []):
            if reply.id == accepted.update_id and isinstance(reply.payload, UpdateSubmitted):
                return reply.payload
        raise LogError(f"update {accepted.update_id}, which counts, is not in the log")

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """What the one array record of a reply holds; nothing for a reply without arrays."""
        sent = _sent(decision)
        if sent.message_type.partition(".")[0] != "train":
            return []
        if self._opened is not None:
            whole = program_of(self._opened.strategy).specs(self._opened, self._base(self._opened))
            return updates.sent(whole, self._opened)
        ref = next(iter(sent.content.arrays.values()), None)
        if ref is None:
            return []
        known = self._known_specs.get(ref.sha256)
        return list(known if known is not None else tensors.specs(self._reader.tensors(ref)))

    @property
    def may_be_smaller(self) -> bool:
        """Whether a reply may hold a part of that."""
        return self._opened is not None and bool(self._smaller(self._opened))

    def _open(self) -> list[tuple[Decision, InstructionSent]]:
        return [pair for pair in self.in_order if pair[0].id not in self._accepted and pair[0].id not in self._excluded]

    def _judge(self, instruction_id: str, sent: InstructionSent, decision: Decision) -> None:
        for reply in self._steps.replies.get(instruction_id, []):
            if reply.payload.client_id != sent.client_id:
                self._refuse(reply, NOT_ADDRESSED)
            elif isinstance(reply.payload, RoundDeclined):
                self._exclude(instruction_id, sent.client_id, f"declined.{reply.payload.reason}", reply.payload.detail)
                return
            else:
                self._judge_update(instruction_id, reply, reply.payload, decision)
                return

    def _judge_update(self, instruction_id: str, reply: Reply, update: UpdateSubmitted, decision: Decision) -> None:
        refusal: UpdateRefusal | None
        if (before := self._steps.refused.get(reply.id)) is not None:
            refusal = UpdateRefusal(before.reason, before.detail)
        else:
            refusal = self._admission.check(update, _sent(decision), self._terms(decision), self._reader)
        if refusal is None:
            self._accepted[instruction_id] = reply
        elif refusal == BLOB_ABSENT:
            self.waits_for_blobs = True
        else:
            self._refuse_answer(instruction_id, reply, refusal)

    def _terms(self, decision: Decision) -> ExpectedReply:
        specs = self.specs(decision)
        if self._opened is not None:
            program = program_of(self._opened.strategy)
            base = self._base(self._opened) if specs and program.from_base else None
            return ExpectedReply(specs, self._opened, base, self._smaller(self._opened) if specs else ())
        refs = _sent(decision).content.arrays.values()
        base = self._reader.tensors(next(iter(refs))) if specs and self._admission.refuse_unchanged else None
        return ExpectedReply(specs, None, base)

    def _smaller(self, opened: RoundOpened) -> Sequence[Sequence[TensorSpec]]:
        if self._smaller_specs is None:
            found = program_of(opened.strategy).smaller(opened, self._base(opened))
            self._smaller_specs = [updates.sent(each, opened) for each in found]
        return self._smaller_specs

    def _base(self, opened: RoundOpened) -> Mapping[str, NDArray[Any]]:
        if self._base_arrays is None:
            self._base_arrays = self._reader.tensors(opened.base)
        return self._base_arrays

    def _give_up(self, instruction_id: str, client_id: str, missing: str) -> None:
        answers = self._answers(instruction_id, client_id)
        if answers and missing == SILENT:
            self._refuse_answer(instruction_id, answers[0], BLOB_ABSENT)
        else:
            self._exclude(instruction_id, client_id, missing)

    def _answers(self, instruction_id: str, client_id: str) -> list[Reply]:
        return [each for each in self._steps.replies.get(instruction_id, []) if each.payload.client_id == client_id]

    def _drop_inconsistent(self) -> None:
        order = [decision.id for decision, _ in self.in_order if decision.id in self._accepted]
        updates = [reply.payload for reply in map(self._accepted.__getitem__, order)]
        for index in inconsistent([each.content for each in updates if isinstance(each, UpdateSubmitted)]):
            self._refuse_answer(order[index], self._accepted.pop(order[index]), INCONSISTENT)

    def _note_duplicates(self) -> None:
        for decision, sent in self.in_order:
            answers = self._answers(decision.id, sent.client_id)
            for reply in answers[1:]:
                # The same answer again, under another event id and sequence number, is no second one.
                if reply.payload != msgspec.structs.replace(answers[0].payload, seq=reply.payload.seq):
                    self._refuse(reply, DUPLICATE)

    def _refuse_answer(self, instruction_id: str, reply: Reply, refusal: UpdateRefusal) -> None:
        self._refuse(reply, refusal)
        self._exclude(instruction_id, reply.payload.client_id, f"refused.{refusal.reason}", refusal.detail)

    def _refuse(self, reply: Reply, refusal: UpdateRefusal) -> None:
        noted = any(each.id == reply.id for each, _ in self._refusals)
        if not noted and reply.id not in self._steps.refused and isinstance(reply.payload, UpdateSubmitted):
            self._refusals.append((reply, refusal))

    def _exclude(self, instruction_id: str, client_id: str, reason: str, detail: str = "") -> None:
        self._excluded[instruction_id] = Exclusion(client_id, reason[:80], detail)

    def _accept(self, instruction_id: str, reply: Reply) -> AcceptedUpdate:
        update = reply.payload
        assert isinstance(update, UpdateSubmitted)
        return AcceptedUpdate(
            client_id=update.client_id,
            update_id=reply.id,
            instruction_id=instruction_id,
            blob=next(iter(update.content.arrays.values()), None),
            weight=self._admission.weight(update, self._opened),
        )


def _sent(decision: Decision) -> InstructionSent:
    assert isinstance(decision.payload, InstructionSent)
    return decision.payload

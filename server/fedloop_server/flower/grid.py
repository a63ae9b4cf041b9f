"""A `flwr.serverapp.Grid` over the event log: Flower's strategies run on it unchanged, and resume where they stopped.

A run is a durable execution. Its steps are numbered: each list of nodes, each instruction, each collection of replies and each
recorded result is one, and each is an event. A grid that is started again replays the steps that are in the log, asks nobody
twice, and goes on with the first one that is not.

- What decides who takes part is repeated: after each call Python's and numpy's global generators are seeded from the run and the
  step, which are public. After replies were collected numpy's is seeded from the operating system instead: what a strategy draws
  then is noise, and its seed must be known to nobody. `strategies.Durable` records what came of it.
- Every instruction that was not answered acceptably gives an error reply. A DP strategy of Flower's then skips the round; if the
  reply were left out, it would calibrate its noise to more clients than there were.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Final, NamedTuple

import numpy as np
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import UsageError
from fedloop_events.flower.messages import Run, error_reply, identify_process, new_run, reply, run_number
from fedloop_events.flower.records import ContentWriter, Unstored, content_sha256, from_content
from fedloop_events.folds.identities import Client
from fedloop_events.folds.rounds import grace_after_quorum
from fedloop_events.logs.port import EventLog
from fedloop_events.types import AT_WORK, InstructionSent, NodesListed, ResultRecorded, RoundClosed, RoundOpened, StepCollected
from fedloop_events.writer import EventWriter
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedloop_server.flower.admission import Admission
from fedloop_server.flower.collecting import NOT_NEEDED, SILENT, SLOW, Collection
from fedloop_server.flower.journal import Journal, ReplayError
from fedloop_server.flower.steps import Decision, ReadsRun, RunReader

MAX_MESSAGES: Final = 10_000
"""Of one push: what a collection decided is one event and its parts, of which there are hundreds at most."""
POLL_S: Final = 60.0
"""How long `get_node_ids` waits for another answer before it gives the same one a third time."""


class EarlierRound(NamedTuple):
    """A buffered round that is closed. What the clients that are `at_work` for it still send may count in the round in hand."""

    opened: RoundOpened
    reads: ReadsRun
    at_work: Set[str]


class LogGrid(Grid):
    """The grid of one run, or with `round` of that round of it.

    `nodes` gives the clients that may be asked (by default all that are enrolled and not revoked). `reads` is what reads the log
    for it (by default a `RunReader` of its own). What is read for `earlier` rounds must be up to date whenever `reads` is.

    Every method raises FencedError once a later epoch than `epoch` has begun, and ReplayError if the run decides otherwise than
    it did before.
    """

    def __init__(
        self,
        log: EventLog,
        blobs: BlobStore,
        writer: EventWriter,
        *,
        run_id: str,
        epoch: int,
        nodes: Callable[[], Sequence[Client]] | None = None,
        round: RoundOpened | None = None,  # noqa: A002 (the field's term)
        admission: Admission | None = None,
        reads: ReadsRun | None = None,
        earlier: Sequence[EarlierRound] = (),
    ) -> None:
        self.collected: StepCollected | None = None
        """What the last collection decided."""
        self._round, self._admission = round, admission or Admission()
        reads = reads or RunReader(log, run_id, None if round is None else round.round_id)
        self._identities, self._nodes = reads.identities, nodes or self._enrolled
        self._journal = Journal(log, writer, reads, epoch=epoch)
        self._earlier = [(each, Journal(log, writer, each.reads, epoch=epoch)) for each in earlier]
        self._blobs, self._writer, self._checker = blobs, ContentWriter(blobs), ContentWriter(Unstored())
        self._reader = TensorReader(blobs)
        self._listed: list[list[str]] = []
        self.set_run(new_run(run_number(self._identities.origin, run_id)))

    # --- Flower's interface ------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        self._run = run
        identify_process(run.run_id)

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes that may be asked, sorted. A third answer in a row that would be the same waits up to `POLL_S` for another:
        Flower's strategies ask each second until there are enough, and each answer is an event."""
        step = self._journal.next_step()
        listed = self._journal.replayed(step, NodesListed)
        if listed is None:
            listed = self._journal.decide(NodesListed(step=step, node_ids=self._current_nodes(), **self._journal.common))
        self._listed = [*self._listed[-1:], listed.node_ids]
        self._seed(step)
        return [int(node) for node in listed.node_ids]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message once, all in one append; ids in the order of `messages`.

        Raises UsageError for a message to a node that is not enrolled, ContentError or TensorError for one that no event or blob
        can hold.
        """
        clients = {client.node_id: client.client_id for client in self._identities.clients.values()}
        drafts = [self._draft(message, clients) for message in messages]
        if len(drafts) > MAX_MESSAGES:
            raise UsageError(f"{len(drafts)} messages are more than one step can hold", hint=f"send at most {MAX_MESSAGES}")
        self._journal.decide_all([each for each in drafts if self._journal.replayed(each.step, InstructionSent) is None])
        sent = [self._matching(draft).id for draft in drafts]
        self._listed = []
        if drafts:
            self._seed(drafts[-1].step)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there now; a message that has none yet is left out. Each call is a step."""
        return self._collect(message_ids, timeout_s=0.0, final=self._round is not None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then collect until all have answered or `timeout` seconds have passed since the push.

        One reply for each message, sorted by instruction, its arrays read when asked; an error reply if the client declined, was
        refused, or was silent. The time runs by the log's own clock over restarts.
        """
        pushed = self.push_messages(messages)
        return self._collect(pushed, timeout_s=timeout, final=True) if pushed else []

    # --- more than Flower's interface --------------------------------------------------------------------------------

    def close_round(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """`send_and_receive`, as the last step of the round: with what it collects the round is closed. It ends before
        `timeout` where the round's terms say so: with enough updates, or a grace after its quorum. What comes for the earlier
        rounds is collected with it; the replies are those to `messages` alone."""
        return self._collect(self.push_messages(messages), timeout_s=timeout, final=True, kind=RoundClosed)

    def record(self, compute: Callable[[], RecordDict]) -> RecordDict:
        """A step that computes: what `compute` gave when the step was first taken, durable before it is returned."""
        step = self._journal.next_step()
        recorded = self._journal.replayed(step, ResultRecorded)
        if recorded is None:
            content = self._writer.content(compute())
            recorded = self._journal.decide(ResultRecorded(step=step, content=content, **self._journal.common))
        return from_content(recorded.content, TensorReader(self._blobs))

    def node_id(self, client_id: str) -> int:
        """Flower's number of an enrolled client."""
        client = self._identities.clients.get(client_id)
        if client is None:
            raise UsageError(f"client {client_id} is not enrolled")
        return client.node_id

    # --- steps -------------------------------------------------------------------------------------------------------

    def _draft(self, message: Message, clients: Mapping[int, str]) -> InstructionSent:
        step, metadata = self._journal.next_step(), message.metadata
        client_id = clients.get(metadata.dst_node_id)
        if client_id is None:
            raise UsageError(f"node {metadata.dst_node_id} is not enrolled")
        # What is replayed is compared, and written nowhere.
        writer = self._writer if self._journal.replayed(step, InstructionSent) is None else self._checker
        content = writer.content(message.content)
        return InstructionSent(
            step=step,
            client_id=client_id,
            message_type=metadata.message_type,
            content=content,
            content_sha256=content_sha256(metadata.message_type, client_id, content),
            ttl_s=metadata.ttl,
            group_id=metadata.group_id,
            **self._journal.common,
        )

    def _matching(self, draft: InstructionSent) -> Decision:
        """The instruction at the draft's step, which must say the same."""
        decision = self._journal.steps.decisions[draft.step]
        recorded = self._journal.replayed(draft.step, InstructionSent)
        if recorded is None or recorded.content_sha256 != draft.content_sha256:
            raise ReplayError(
                f"the run would send something else at step {draft.step} than event {decision.id} records",
                cause="its code, its configuration or an unrecorded random choice is not what it was",
                hint="run it as it was, or begin a new run",
            )
        return decision

    def _collect(
        self,
        instruction_ids: Iterable[str],
        *,
        timeout_s: float | None,
        final: bool,
        kind: type[StepCollected | RoundClosed] = StepCollected,
    ) -> list[Message]:
        step, pushed = self._journal.next_step(), self._journal.instructions()
        try:
            sent = {each: pushed[each] for each in instruction_ids}
        except KeyError:
            raise UsageError("a message id is not one that this run has pushed") from None
        known_specs = self._writer.specs | self._checker.specs
        # Strategies hold on to the replies of the collection before: what was read for them is let go here.
        self._reader.forget()
        reader = self._reader = TensorReader(self._blobs)
        collection = Collection(self._journal.steps, sent, self._round, self._admission, reader, known_specs)
        collected = self._journal.replayed(step, kind)
        if collected is None:
            earlier = self._collections_of_earlier(reader) if kind is RoundClosed else []
            missing = self._gather(collection, timeout_s, earlier, early=kind is RoundClosed)
            accepted, excluded = collection.close(final=final, missing=missing)
            self._journal.refuse(collection.take_refusals())
            for journal, each, _ in earlier:
                accepted += each.close(final=False)[0]
                journal.refuse(each.take_refusals())
            collected = self._journal.decide(kind(step=step, accepted=accepted, excluded=excluded, **self._journal.common))
        self.collected = collected
        self._seed(step, secret_noise=True)
        return self._replies(collection, collected, reader)

    def _collections_of_earlier(self, reader: TensorReader) -> list[tuple[Journal, Collection, float]]:
        """What is still to come for each earlier round, with the moment from which nobody waits for it."""
        found = []
        for each, journal in self._earlier:
            sent = {
                instruction_id: decision
                for instruction_id, decision in journal.instructions().items()
                if isinstance(decision.payload, InstructionSent) and decision.payload.client_id in each.at_work
            }
            collection = Collection(journal.steps, sent, each.opened, self._admission, reader, {})
            found.append((journal, collection, self._deadline(each.opened.deadline_s, collection.sent_ms)))
        return found

    def _gather(
        self,
        collection: Collection,
        timeout_s: float | None,
        earlier: Sequence[tuple[Journal, Collection, float]],
        *,
        early: bool,
    ) -> str:
        """Read and judge replies until every instruction is settled or the time is over; `early`, until the round's terms let it
        end. Why those count as missing who have not answered by then."""
        deadline = math.inf if timeout_s is None else self._deadline(timeout_s, collection.sent_ms)
        grace_ends = math.inf
        buffered = self._round is not None and self._round.max_staleness > 0
        all_journals = [(self._journal, collection), *((journal, each) for journal, each, _ in earlier)]
        wait_s = 0.0
        while True:
            self._journal.catch_up(wait_s)
            for journal, each in all_journals:
                each.judge()
                journal.refuse(each.take_refusals())
            came_ms = [at for _, each in all_journals for at in each.accepted_ms]
            if early and self._round is not None:
                if self._round.enough is not None and len(came_ms) >= self._round.enough:
                    return AT_WORK if buffered else NOT_NEEDED
                grace = grace_after_quorum(self._round, collection.sent_ms, came_ms)
                if grace_ends == math.inf and grace is not None:
                    grace_ends = self._deadline(*grace)
            now = time.monotonic()
            left_s = min(deadline, grace_ends) - now
            complete = collection.complete and all(each.complete or until <= now for _, each, until in earlier)
            if complete or left_s <= 0:
                return SILENT if deadline <= grace_ends else AT_WORK if buffered else SLOW
            waits_for_blobs = any(each.waits_for_blobs for _, each in all_journals)
            wait_s = min(left_s, 0.05 if waits_for_blobs else 1.0)

    def _deadline(self, seconds: float, since_ms: int) -> float:
        """When so many seconds are over since `since_ms` of the log's clock: what passed while no server ran has passed."""
        passed_s = (self._journal.steps.now_ms - since_ms) / 1000
        return time.monotonic() + min(max(seconds - passed_s, 0.0), seconds)

    def _replies(self, collection: Collection, collected: StepCollected, reader: TensorReader) -> list[Message]:
        accepted = {each.instruction_id: each for each in collected.accepted}
        excluded = {each.client_id: each.reason for each in collected.excluded}
        messages, number = [], self._run.run_id
        for decision, sent in collection.in_order:
            node_id = self.node_id(sent.client_id)
            if (each := accepted.get(decision.id)) is not None:
                answer = collection.update(each).content
                known = None if collection.may_be_smaller else dict.fromkeys(answer.arrays, collection.specs(decision))
                content = from_content(answer, reader, known)
                messages.append(reply(content, sent, each.update_id, decision.id, number=number, node_id=node_id))
            elif (reason := excluded.get(sent.client_id)) is not None:
                messages.append(error_reply(reason, sent, decision.id, number=number, node_id=node_id))
        return messages

    def _seed(self, step: int, *, secret_noise: bool = False) -> None:
        digest = hashlib.sha256(self._journal.id("seed", step).encode()).digest()
        random.seed(digest)
        np.random.seed(None if secret_noise else int.from_bytes(digest[:4], "big"))

    # --- clients -----------------------------------------------------------------------------------------------------

    def _current_nodes(self) -> list[str]:
        """The answer of this moment; if it has been given twice in a row, after a wait for another one."""
        deadline = time.monotonic() + POLL_S
        while True:
            self._journal.catch_up()
            answer = [str(node) for node in sorted(client.node_id for client in self._nodes())]
            if len(self._listed) < 2 or any(given != answer for given in self._listed) or time.monotonic() >= deadline:
                return answer
            self._journal.catch_up(0.5)

    def _enrolled(self) -> list[Client]:
        return [client for client in self._identities.clients.values() if not client.revoked]

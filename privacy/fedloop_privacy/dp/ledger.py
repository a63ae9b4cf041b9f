"""The privacy ledger: what each client has spent over its whole life, as a fold over topic `audit`.

Device and server keep the same fold and ask it the same questions: the device `check`s before it records a spend and
touches its data, the server `check_update`s before it accepts what came out. There is one budget for each client, never one
for each model or run, and what was recorded stays spent whatever happened after.

A client's spends form a chain: numbered from 0, each with the hash of the one before. A device that was cloned, or restored
from a backup without reading the log, forks or tears the chain, and is suspended for good. So one device must make its
spends one at a time, each after it has read its own last one back.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal, Self

import msgspec
from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.types import BudgetSpent, Mechanism, Payload
from msgspec import Struct

from fedloop_privacy.dp import accounting

Reason = Literal["budget-exceeded", "client-suspended", "no-budget", "mechanism-mismatch", "spend-missing"]


class Spend(Struct, frozen=True):
    """One recorded spend: `sha256` is that of the payload, `event_id` where it stands in the log."""

    spend_seq: int
    sha256: str
    event_id: str
    instruction_id: str
    mechanism: Mechanism


class Suspension(Struct, frozen=True):
    """Why a client is suspended: the spend, and the event that does not fit the chain."""

    reason: Literal["spend-reused", "chain-broken"]
    spend_seq: int
    event_id: str


class BudgetRefusal(Struct, frozen=True):
    """A stable code, one sentence, and, if it is the budget that ends, what the whole would cost."""

    reason: Reason
    detail: str
    would_be_epsilon: float | None = None


class _Account(Struct):
    spends: list[Spend] = []
    suspended: Suspension | None = None


class Ledger:
    """The spends of every client. A `Fold`; it takes events whose author has been authenticated."""

    topics: Final = (topics.AUDIT,)
    version: Final = 1

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def apply(self, record: Record, payload: Payload) -> None:
        """Take in one event. A spend seen before changes nothing; every other one counts, and suspends the client if its
        number was used before, or if it does not continue the chain."""
        if not isinstance(payload, BudgetSpent):
            return
        account = self._accounts.setdefault(payload.client_id, _Account())
        spend = Spend(payload.spend_seq, spend_sha256(payload), record.id, payload.instruction_id, payload.mechanism)
        if _continues(account, payload):
            account.spends.append(spend)
            return
        if any(spend.sha256 == known.sha256 for known in account.spends):
            return
        if account.suspended is None:
            used = spend.spend_seq < len(account.spends)
            account.suspended = Suspension("spend-reused" if used else "chain-broken", spend.spend_seq, record.id)
        account.spends.append(spend)

    def spends(self, client_id: str) -> tuple[Spend, ...]:
        """All that the client recorded, in the order of the log; also what does not fit the chain."""
        return tuple(self._account(client_id).spends)

    def spent(self, client_id: str) -> tuple[Mechanism, ...]:
        """The mechanisms of `spends`."""
        return tuple(spend.mechanism for spend in self._account(client_id).spends)

    def spend_for(self, client_id: str, instruction_id: str) -> Spend | None:
        """The first spend that pays for an instruction: a device that finds one must not train for it again."""
        spends = self._account(client_id).spends
        return next((spend for spend in spends if spend.instruction_id == instruction_id), None)

    def suspended(self, client_id: str) -> Suspension | None:
        """The evidence for which the client is suspended, or None."""
        return self._account(client_id).suspended

    def epsilon(self, client_id: str, delta: float) -> float:
        """What the client has spent over its whole life, composed jointly: `accounting.epsilon`."""
        return accounting.epsilon(self.spent(client_id), delta)

    def would_be(self, client_id: str, mechanism: Mechanism, delta: float) -> float:
        """`epsilon` if the client spent `mechanism` on top."""
        return accounting.epsilon([*self.spent(client_id), mechanism], delta)

    def check(self, client_id: str, mechanism: Mechanism | None, budget: float | None, delta: float) -> BudgetRefusal | None:
        """Why the client may not spend `mechanism` (None: a round without differential privacy), or None if it may.

        `budget` is the epsilon it enrolled with; None allows everything, also rounds without differential privacy. Raises
        MechanismError for terms on which no claim can rest.
        """
        if self.suspended(client_id) is not None:
            return _suspended()
        if budget is None:
            return None
        if mechanism is None:
            return BudgetRefusal("no-budget", "no budget is enough for a round without differential privacy")
        return _over(self.would_be(client_id, mechanism, delta), budget)

    def check_update(
        self,
        client_id: str,
        spend_seq: int | None,
        instruction_id: str,
        mechanism: Mechanism | None,
        budget: float | None,
        delta: float,
    ) -> BudgetRefusal | None:
        """Why an update does not count, or None if it does.

        Its spend must stand in the ledger under `spend_seq`, for this instruction, with exactly the round's `mechanism`, and
        what was spent up to and with it must be within `budget`. The ledger must have read the log up to the update.
        """
        if self.suspended(client_id) is not None:
            return _suspended()
        if mechanism is None:
            return self.check(client_id, None, budget, delta)
        spends = self._account(client_id).spends
        if spend_seq is None or not 0 <= spend_seq < len(spends):
            return BudgetRefusal("spend-missing", "the update names no spend that the client has recorded")
        spend = spends[spend_seq]
        if spend.instruction_id != instruction_id or spend.mechanism != mechanism:
            return BudgetRefusal("mechanism-mismatch", "the recorded spend is not for this instruction under the round's terms")
        if budget is None:
            return None
        return _over(accounting.epsilon([each.mechanism for each in spends[: spend_seq + 1]], delta), budget)

    def next_spend(
        self,
        client_id: str,
        mechanism: Mechanism,
        *,
        origin: str,
        seq: int,
        run_id: str,
        instruction_id: str,
        round_id: str | None = None,
    ) -> BudgetSpent:
        """The event that records `mechanism` as the client's next spend. It is spent once the log holds it."""
        spends = self._account(client_id).spends
        return BudgetSpent(
            origin=origin,
            client_id=client_id,
            seq=seq,
            spend_seq=len(spends),
            previous=spends[-1].sha256 if spends else "",
            run_id=run_id,
            instruction_id=instruction_id,
            mechanism=mechanism,
            round_id=round_id,
        )

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self._accounts)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        ledger = cls()
        ledger._accounts = msgspec.msgpack.decode(state, type=dict[str, _Account])
        return ledger

    def _account(self, client_id: str) -> _Account:
        return self._accounts.get(client_id) or _Account()


def spend_sha256(payload: BudgetSpent) -> str:
    """SHA-256 of the payload's JSON as `envelope.encode` writes it: the next spend's `previous`."""
    return hashlib.sha256(msgspec.json.encode(payload)).hexdigest()


def _continues(account: _Account, payload: BudgetSpent) -> bool:
    head = account.spends[-1].sha256 if account.spends else ""
    return payload.spend_seq == len(account.spends) and payload.previous == head


def _suspended() -> BudgetRefusal:
    return BudgetRefusal("client-suspended", "the client's chain of spends was forked or torn")


def _over(would_be: float, budget: float) -> BudgetRefusal | None:
    if would_be <= budget:
        return None
    return BudgetRefusal("budget-exceeded", f"epsilon would be {would_be:.3f} of {budget:g}", would_be)

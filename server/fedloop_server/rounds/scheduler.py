"""Choosing who takes part in a round: a pure function of what the log says, and one draw from the operating system."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec
from fedloop_events.folds.identities import Client
from fedloop_events.folds.rounds import RoundState, RoundsView
from fedloop_events.types import AT_WORK, Exclusion, Mechanism
from msgspec import Struct

from fedloop_server.config import ServerConfig
from fedloop_server.operations.clients import absence

MAX_OPENING_BYTES: Final = 1 << 20
"""Of the exclusions that a round's opening names: some ten thousand, in some dozens of events."""
MAX_ABORT_BYTES: Final = 40 * 1024
"""Of those that an abort names, in one event."""

_WEIGHT_ROOM: Final = 2
"""A device may have twice as many examples as the median one before it weighs no more for them."""
OUTCOMES: Final = 5
LOOK_BACK: Final = 20
"""Rounds after which what a client did no longer matters."""
DECLINED: Final = 1
NO_ANSWER: Final = 2
PATIENCE_CYCLES: Final = 4
"""How many times the rounds that ask everybody once may leave a client out: by even chance they do so with one in 50."""

BudgetCheck = Callable[[Client, Mechanism], str | None]
"""Why a client cannot pay for a mechanism, as a stable code; None if it can."""


class Eligibility(Struct, frozen=True):
    """Who could take part now, and why the others could not; both sorted by client."""

    clients: list[str]
    excluded: list[Exclusion]

    @property
    def at_work(self) -> int:
        """How many are still to send an update, which this round may get though it does not ask them."""
        return sum(each.reason == AT_WORK for each in self.excluded)


def eligible(
    clients: Iterable[Client],
    mechanism: Mechanism | None,
    config: ServerConfig,
    *,
    now_ms: int,
    budget: BudgetCheck,
    at_work: Collection[str] = (),
) -> Eligibility:
    """Split enrolled clients. `now_ms` is the log's own clock, by which they were last seen.

    Reasons: what `absence` says, `AT_WORK` for those whose update is still to come, "wants-privacy" (a round without differential
    privacy is not for a client that has a budget), and what `budget` says.
    """
    chosen: list[str] = []
    excluded: list[Exclusion] = []
    for client in sorted(clients, key=lambda client: client.client_id):
        reason = absence(client, config, now_ms) or (AT_WORK if client.client_id in at_work else None)
        reason = reason or _unfit(client, mechanism, budget)
        if reason is None:
            chosen.append(client.client_id)
        else:
            excluded.append(Exclusion(client.client_id, reason))
    return Eligibility(chosen, excluded)


def at_work(rounds: RoundsView, now_ms: int) -> set[str]:
    """The clients that are at work for an earlier, buffered round, and in time."""
    return {client_id for state in in_time(rounds, now_ms) for client_id in state.at_work}


def in_time(rounds: RoundsView, now_ms: int) -> list[RoundState]:
    """The closed rounds that clients are at work for and that are not past their deadline by now."""
    return [each for each in rounds.buffered if each.opened and now_ms - each.opened_ms <= each.opened.deadline_s * 1000]


class Past(NamedTuple):
    """What the last rounds say of the clients; one that is not named was in none of them.

    `unasked` counts the rounds since a client was last asked (0: in the last one), among the `seen` that were looked at.
    """

    unasked: Mapping[str, int] = MappingProxyType({})
    weights: Mapping[str, float] = MappingProxyType({})
    patience: int = 1
    seen: int = 0

    def wait(self, client_id: str) -> int:
        """Rounds for which a client that could not take part any earlier goes first; 0 if its turn is a matter of chance."""
        unasked = self.unasked.get(client_id, self.seen)
        return unasked if unasked >= self.patience else 0


NO_PAST: Final = Past()


def past(rounds: RoundsView, clients: int, size: int, unasked_rounds: int) -> Past:
    """Look back as far as matters where cohorts of `size` are drawn from so many clients.

    A weight is 1, and less the more of the last `OUTCOMES` that a client had in the last `LOOK_BACK` rounds were bad: then it
    is back at 1, for the reasons for a decline pass. A decline costs a round little; silence, or an answer that does not
    count, makes it wait.
    """
    cycle = -(-clients // size)
    patience = max(unasked_rounds, PATIENCE_CYCLES * cycle)
    unasked: dict[str, int] = {}
    outcomes: dict[str, list[int]] = {}
    opened = (each for each in reversed(rounds.rounds.values()) if each.opened is not None)
    seen = 0
    for ago, state in enumerate(islice(opened, max(LOOK_BACK, patience + cycle))):
        seen += 1
        counted = {*(update.client_id for each in state.collected for update in each.accepted), *state.counted_later}
        for client_id in state.opened.cohort if state.opened else ():
            unasked.setdefault(client_id, ago)
            cost = _cost(state, client_id, counted)
            if cost is not None and ago < LOOK_BACK and len(found := outcomes.setdefault(client_id, [])) < OUTCOMES:
                found.append(cost)
    weights = {client: (1 + costs.count(0)) / (1 + costs.count(0) + sum(costs)) for client, costs in outcomes.items()}
    return Past(unasked, weights, patience, seen)


def draw(eligibility: Eligibility, size: int, source: random.Random, past: Past = NO_PAST) -> Eligibility:
    """At most `size` of the eligible clients, by their weights; the others are excluded as "not-drawn".

    Whoever waits for `past.patience` rounds goes first, the longest first: so a client that could take part all the time is asked
    at least once in `patience` rounds and as many more as it takes to ask everybody once. The others are drawn without
    replacement, each time by weight (Efraimidis and Spirakis, 2006, "Weighted random sampling with a reservoir").
    With the operating system's source nobody can foresee, or repeat until it suits, who is asked: the outcome is recorded once.
    """
    if len(eligibility.clients) <= size:
        return eligibility

    def turn(client_id: str) -> tuple[int, float]:
        # 1 - random() is never 0; the logarithm of u ** (1 / w) keeps its order where the power would underflow.
        return past.wait(client_id), math.log(1.0 - source.random()) / past.weights.get(client_id, 1.0)

    drawn = set(heapq.nlargest(size, eligibility.clients, key=turn))
    left = [Exclusion(client, "not-drawn") for client in eligibility.clients if client not in drawn]
    return Eligibility(sorted(drawn), sorted([*eligibility.excluded, *left], key=lambda each: each.client_id))


def weight_bound(cohort: Iterable[Client]) -> float:
    """The most that one update of a round without differential privacy weighs: a small multiple of what the median client of the
    cohort may have, by heartbeats. It holds as long as fewer than half of the cohort report what is not true.
    """
    may_have = [2 * max(client.examples_at_least, 1) for client in cohort]
    return float(_WEIGHT_ROOM * statistics.median_low(may_have))


def bounded(excluded: list[Exclusion], max_bytes: int) -> list[Exclusion]:
    """As many exclusions as have so many bytes; those that were merely not drawn are left out first, then the last ones."""
    left = max_bytes
    kept: list[Exclusion] = []
    for each in sorted(excluded, key=lambda each: (each.reason == "not-drawn", each.client_id)):
        left -= len(msgspec.json.encode(each)) + 1
        if left < 0:
            break
        kept.append(each)
    return sorted(kept, key=lambda each: each.client_id)


def _cost(state: RoundState, client_id: str, counted: set[str]) -> int | None:
    """What a client cost a round that it was asked in; None if the round says nothing of it: it ended before its time."""
    if client_id in counted:
        return 0
    if client_id in state.declined:
        return DECLINED
    return None if state.closed is None or client_id in state.at_work else NO_ANSWER


def _unfit(client: Client, mechanism: Mechanism | None, budget: BudgetCheck) -> str | None:
    if mechanism is None:
        return None if client.epsilon is None else "wants-privacy"
    return budget(client, mechanism)

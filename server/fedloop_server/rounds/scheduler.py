"""Choosing who takes part in a round: a pure function of what the log says, and one draw from the operating system."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from fedloop_events.folds.identities import Client
from fedloop_events.types import Exclusion, Mechanism
from msgspec import Struct

from fedloop_server.config import ServerConfig

MAX_OPENING_BYTES: Final = 1 << 20
"""Of the exclusions that a round's opening names: some ten thousand, in some dozens of events."""
MAX_ABORT_BYTES: Final = 40 * 1024
"""Of those that an abort names, in one event."""

BudgetCheck = Callable[[Client, Mechanism], str | None]
"""Why a client cannot pay for a mechanism, as a stable code; None if it can."""


class Eligibility(Struct, frozen=True):
    """Who could take part now, and why the others could not; both sorted by client."""

    clients: list[str]
    excluded: list[Exclusion]


def eligible(
    clients: Iterable[Client], mechanism: Mechanism | None, config: ServerConfig, *, now_ms: int, budget: BudgetCheck
) -> Eligibility:
    """Split enrolled clients. `now_ms` is the log's own clock, by which they were last seen.

    Who was last seen longer ago than `availability_s` is unavailable, and so is who will be seen in a future as far away: its
    clock is wrong, and would keep it available for as long after it is gone.

    Reasons: "revoked", "unavailable", "too-few-examples", "wants-privacy" (a round without differential privacy is not for a
    client that has a budget), and what `budget` says.
    """
    chosen: list[str] = []
    excluded: list[Exclusion] = []
    for client in sorted(clients, key=lambda client: client.client_id):
        reason = _reason(client, mechanism, config, now_ms, budget)
        if reason is None:
            chosen.append(client.client_id)
        else:
            excluded.append(Exclusion(client.client_id, reason))
    return Eligibility(chosen, excluded)


def draw(eligibility: Eligibility, size: int, source: random.Random) -> Eligibility:
    """At most `size` of the eligible clients, each set as likely as any other; the others are excluded as "not-drawn".

    With the operating system's source nobody can foresee, or repeat until it suits, who is asked: the outcome is recorded once.
    """
    if len(eligibility.clients) <= size:
        return eligibility
    drawn = set(source.sample(eligibility.clients, size))
    left = [Exclusion(client, "not-drawn") for client in eligibility.clients if client not in drawn]
    return Eligibility(sorted(drawn), sorted([*eligibility.excluded, *left], key=lambda each: each.client_id))


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


def _reason(client: Client, mechanism: Mechanism | None, config: ServerConfig, now_ms: int, budget: BudgetCheck) -> str | None:
    if client.revoked:
        return "revoked"
    if abs(now_ms - client.seen_ms) > config.availability_s * 1000:
        return "unavailable"
    if client.examples_at_least < config.min_examples:
        return "too-few-examples"
    if mechanism is None:
        return None if client.epsilon is None else "wants-privacy"
    return budget(client, mechanism)

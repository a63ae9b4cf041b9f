"""Who takes part in a round, and what it is asked for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from devices import CONFIG, PLAN, World, evaluate
from fedloop_events import envelope, types
from fedloop_events.folds.identities import Client, RecordPosition
from fedloop_events.folds.rounds import RoundState, RoundsView
from fedloop_events.parts import split
from fedloop_events.types import Exclusion, Mechanism
from fedloop_server.config import MAX_COHORT, ServerConfig
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.planner import Planner
from fedloop_server.rounds.scheduler import MAX_OPENING_BYTES, Eligibility, bounded, draw, eligible, past, weight_bound
from fedloop_tasks.classification.plan import ClassificationPlan
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

PLACE = RecordPosition("log", 1, 0)
NOW_MS = 1_000_000
GAUSS = Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, steps=1, divisor=1.0)


def client(name: str, **changes: object) -> Client:
    here = Client(
        client_id=name,
        public_key="",
        node_id=1,
        epsilon=8.0,
        delta=1e-5,
        enrolled_at=PLACE,
        seen_ms=NOW_MS,
        examples_at_least=64,
    )
    return replace(here, **changes)


def no_limit(client: Client, mechanism: Mechanism) -> str | None:
    return None


def reason(one: Client, mechanism: Mechanism | None = GAUSS, **config: object) -> str | None:
    settings = replace(CONFIG, **config)
    found = eligible([one], mechanism, settings, now_ms=NOW_MS, budget=no_limit)
    assert len(found.clients) + len(found.excluded) == 1
    return found.excluded[0].reason if found.excluded else None


def test_each_client_is_in_or_out_for_one_reason() -> None:
    assert reason(client("a")) is None
    assert reason(client("a", revoked_at=PLACE, examples_at_least=0)) == "revoked"
    assert reason(client("a", seen_ms=NOW_MS - 120_000)) is None
    assert reason(client("a", seen_ms=NOW_MS - 120_001)) == "unavailable"
    assert reason(client("a", seen_ms=NOW_MS + 120_000)) is None
    assert reason(client("a", seen_ms=NOW_MS + 120_001)) == "unavailable"
    assert reason(client("a", examples_at_least=0)) == "too-few-examples"
    assert reason(client("a", examples_at_least=0), min_examples=0) is None
    assert reason(client("a", epsilon=None)) is None


def test_a_round_without_privacy_is_only_for_clients_that_allow_it() -> None:
    assert reason(client("a"), mechanism=None) == "wants-privacy"
    assert reason(client("a", epsilon=None), mechanism=None) is None


def test_the_budget_has_the_last_word() -> None:
    clients = [client("b"), client("a")]
    found = eligible(
        clients, GAUSS, CONFIG, now_ms=NOW_MS, budget=lambda one, _: "budget-exceeded" if one.client_id == "a" else None
    )
    assert found == Eligibility(["b"], [Exclusion("a", "budget-exceeded")])


def test_a_cohort_is_drawn_evenly_and_the_others_are_named() -> None:
    found = Eligibility([f"c{number}" for number in range(6)], [Exclusion("a", "revoked")])
    counts: Counter[str] = Counter()
    source = random.Random(1)
    for _ in range(600):
        drawn = draw(found, 2, source)
        counts.update(drawn.clients)
        assert len(drawn.clients) == 2
        assert {each.client_id for each in drawn.excluded} | set(drawn.clients) == {"a", *found.clients}
        assert Counter(each.reason for each in drawn.excluded) == {"revoked": 1, "not-drawn": 4}
    assert all(140 < count < 260 for count in counts.values())
    assert draw(found, 6, source) is found


BASE = types.BlobRef("0" * 64, 1)


def ended(
    rounds: RoundsView, cohort: list[str], *, declined: Iterable[str] = (), silent: Iterable[str] = (), cut: bool = False
) -> None:
    """One more round: those who neither declined nor were silent have taken part; `cut`: it was aborted before its time."""
    number = rounds.next_number
    opened = types.RoundOpened(
        "o", 1, "main", f"r{number:04d}", "q", number, "default", "x", BASE, "ffa", cohort, 1, 1.0, ["x"], 1, 1.0
    )
    out = {*declined, *silent}
    accepted = [types.AcceptedUpdate(each, "0" * 32, "0" * 32, BASE, 1.0) for each in cohort if each not in out]
    state = RoundState(opened.round_id, number, "q", opened, declined=dict.fromkeys(declined, "not-idle"))
    if cut:
        state.aborted = types.RoundAborted("o", 1, "main", opened.round_id, "operator")
    else:
        state.closed = types.RoundClosed("o", 1, "main", 0, accepted, [], opened.round_id)
    rounds.rounds[opened.round_id] = state


def simulated(
    clients: int, size: int, count: int, *, declining: int, silent: int, seed: int, unasked_rounds: int = 20
) -> list[set[str]]:
    """The cohorts of so many rounds; the first clients decline whatever they are asked, the next ones are silent."""
    names = [f"c{number:03d}" for number in range(clients)]
    rounds, source, cohorts = RoundsView(), random.Random(seed), []
    for _ in range(count):
        cohort = draw(Eligibility(names, []), size, source, past(rounds, clients, size, unasked_rounds)).clients
        ended(
            rounds,
            cohort,
            declined=[each for each in cohort if each in names[:declining]],
            silent=[each for each in cohort if each in names[declining : declining + silent]],
        )
        cohorts.append(set(cohort))
    return cohorts


@given(
    clients=st.integers(2, 24),
    size=st.integers(1, 8),
    bad=st.integers(0, 24),
    unasked_rounds=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_no_client_starves_whatever_it_did(clients: int, size: int, bad: int, unasked_rounds: int, seed: int) -> None:
    cycle = -(-clients // size)
    bound = max(unasked_rounds, 4 * cycle) + cycle
    cohorts = simulated(
        clients, size, 2 * bound + 2, declining=bad // 2, silent=bad - bad // 2, seed=seed, unasked_rounds=unasked_rounds
    )
    for name in (f"c{number:03d}" for number in range(clients)):
        asked = [-1, *(number for number, cohort in enumerate(cohorts) if name in cohort), len(cohorts)]
        assert max(later - one for one, later in pairwise(asked)) <= bound + 1


def test_who_declines_is_asked_less_and_who_is_silent_still_less() -> None:
    cohorts = simulated(30, 6, 400, declining=10, silent=10, seed=1)
    declining, silent, willing = (
        sum(f"c{number:03d}" in cohort for cohort in cohorts for number in each)
        for each in (range(10), range(10, 20), range(20, 30))
    )
    assert silent < 0.9 * declining
    assert declining < 0.7 * willing
    assert silent > 100


def test_what_a_client_did_is_forgotten_after_some_rounds() -> None:
    rounds = RoundsView()
    for _ in range(3):
        ended(rounds, ["a", "b", "c"], declined=["a"], silent=["b"])
    assert past(rounds, 3, 1, 20).weights == {"a": 1 / 4, "b": 1 / 7, "c": 1.0}
    ended(rounds, ["a"])
    assert past(rounds, 3, 1, 20).weights["a"] == 2 / 5
    for _ in range(20):
        ended(rounds, ["c"])
    assert past(rounds, 3, 1, 20).weights == {"c": 1.0}


def test_a_round_that_was_cut_short_says_nothing_of_who_had_not_answered() -> None:
    rounds = RoundsView()
    ended(rounds, ["a", "b"], declined=["b"], cut=True)
    assert past(rounds, 2, 1, 20).weights == {"b": 0.5}


class Fair(random.Random):
    """Chance favours nobody, so that the weights alone decide."""

    def random(self) -> float:
        return 0.5


def test_a_server_draws_by_what_its_log_says(tmp_path: Path) -> None:
    config = replace(CONFIG, quorum=1, cohort_size=1)
    world = World(tmp_path / "deployment", config)
    world.device("ann", behave=lambda opened, arrays: "not-charging")
    world.device("bob")
    world.request(2)
    server = Server(world.log, world.blobs, world.writer, config, evaluate=evaluate, source=Fair())
    with world.serving():
        assert server.run(rounds=2) == 2
    assert [each.opened.cohort for each in world.rounds.rounds.values() if each.opened] == [["ann"], ["bob"]]


def test_the_largest_round_fits_into_its_events() -> None:
    long = "c" * 76
    cohort = [f"{long}{number:04d}" for number in range(MAX_COHORT)]
    out = [Exclusion(f"{long}{number:05d}", "not-drawn") for number in range(50_000)] + [Exclusion("z", "revoked")]
    kept = bounded(out, MAX_OPENING_BYTES)
    assert kept[-1] == Exclusion("z", "revoked")
    assert len(kept) > 5000
    assert bounded(out, 1000)[-1] == Exclusion("z", "revoked")
    opened = types.RoundOpened(
        "o" * 80, 1, "main", "r0001", "q" * 80, 1, "default", "x" * 80, types.BlobRef("0" * 64, 2**50), "fedavg",
        cohort, 2, 1.0, [f"lora.{layer}.attention.self.query.{part}" for layer in range(24) for part in "AB" * 4],
        2**40, 1.0, GAUSS, {}, kept,
    )  # fmt: skip
    accepted = [types.AcceptedUpdate(each, "0" * 32, "0" * 32, types.BlobRef("0" * 64, 2**50), 1234.5) for each in cohort]
    silent = [Exclusion(each, "r" * 80, "d" * 200) for each in cohort]
    closed = types.RoundClosed("o" * 80, 1, "main", 1000, accepted, silent, "r0001")
    for said in (opened, closed):
        events = split(said)
        assert len(events) > 10
        for each in events:
            envelope.encode(each, id="0" * 32, time_s=0)
    proposed = types.ReleaseProposed(
        "o" * 80, "m" * 80, 1, "x" * 80, 1, types.BlobRef("0" * 64, 2**50), "r0001", "x" * 80, "s" * 80, ["0" * 32] * MAX_COHORT
    )
    envelope.encode(proposed, id="0" * 32, time_s=0)


# --- the plan --------------------------------------------------------------------------------------------------------


def planned(**changes: object) -> ServerConfig:
    return replace(CONFIG, plan=replace(PLAN, **changes))


def test_the_plan_is_found_once_and_again_when_the_numbers_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = ClassificationPlan.mechanisms

    def counting(plan: ClassificationPlan) -> dict[str, Mechanism]:
        calls.append(plan)
        return real(plan)

    monkeypatch.setattr(ClassificationPlan, "mechanisms", counting)
    cache = tmp_path / "plan.json"
    first = Planner(CONFIG, cache=cache).terms("ffa")
    assert Planner(CONFIG, cache=cache).terms("ffa") == first
    assert len(calls) == 1
    other = Planner(planned(epsilon=4.0), cache=cache).terms("ffa")
    assert other != first
    assert len(calls) == 2
    for broken in (b"{", b'{"config_sha256": "0", "sums": {}, "training": {}}'):
        cache.write_bytes(broken)
        assert Planner(CONFIG, cache=cache).terms("ffa") == first
    assert Planner(CONFIG, cache=tmp_path / "absent" / "plan.json").terms("ffa") == first


def test_an_aborted_round_does_not_use_up_the_plan(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", replace(CONFIG, deadline_s=0.2))
    for name in ("ann", "bob"):
        world.device(name, behave=lambda opened, arrays: None if opened.number == 1 else arrays)
    world.request(2)
    with world.serving():
        server = world.server()
        server.run(rounds=2)
    programs = [each.opened.strategy for each in world.rounds.rounds.values() if each.opened]
    assert [each.state for each in world.rounds.rounds.values()] == ["aborted", "closed"]
    assert programs == ["sums", "sums"]
    assert server.planner.next_program(world.rounds, world.releases) == "ffa"


def test_sums_may_be_as_long_as_a_device_has_examples(tmp_path: Path) -> None:
    """The bound of a round is the operator's, or more where the task's terms say so."""
    world = World(tmp_path / "deployment", replace(planned(nominal_examples=1000), max_update_norm=1000.0))
    for name in ("ann", "bob"):
        world.device(name)
    world.request(2)
    with world.serving():
        world.server().run(rounds=2)
    opened = [each.opened for each in world.rounds.rounds.values() if each.opened]
    assert [(each.strategy, each.max_update_norm) for each in opened] == [("sums", 4000.0), ("ffa", 1000.0)]


def test_the_weight_bound_follows_the_median_client_and_not_who_reports_most() -> None:
    reported = [64, 64, 32, 2**40, 2**40]
    assert weight_bound(client(str(n), examples_at_least=many) for n, many in enumerate(reported)) == 256
    assert weight_bound([client("a", examples_at_least=16), client("b", examples_at_least=2**40)]) == 64
    assert weight_bound([client("a", examples_at_least=0)]) == 4

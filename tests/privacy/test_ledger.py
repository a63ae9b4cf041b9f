"""No sequence of accepted spends exceeds a budget, nothing counts twice, and a forked or torn chain suspends its client."""

from __future__ import annotations

import hashlib
import random

import msgspec
import pytest
from fedloop_events import envelope, topics
from fedloop_events.envelope import Record
from fedloop_events.types import BudgetSpent, Mechanism, Payload, TextMasked
from fedloop_privacy.dp import accounting
from fedloop_privacy.dp.ledger import BudgetRefusal, Ledger, spend_sha256
from fedloop_tasks.classification.plan import ClassificationPlan
from hypothesis import given, settings
from hypothesis import strategies as st

DELTA = 1e-5


def mechanism(sampling_rate: float = 0.1, noise_multiplier: float = 1.0, steps: int = 5) -> Mechanism:
    return Mechanism(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, clip_norm=1.0, steps=steps, divisor=10.0)


def record(payload: Payload, number: int = 1) -> Record:
    event = envelope.encode(payload, id=f"{number:032x}", time_s=0)
    return Record(
        topic=event.topic,
        key=event.key,
        id=event.id,
        source=event.source,
        type=event.type,
        time_s=0,
        data=event.data,
        stream="audit",
        offset=number,
        appended_ms=0,
    )


def instruction(number: int) -> str:
    return f"{number:032x}"


def make(ledger: Ledger, terms: Mechanism, client_id: str = "ada", number: int = 0) -> BudgetSpent:
    return ledger.next_spend(
        client_id, terms, origin="home", seq=number, run_id="run", instruction_id=instruction(number), round_id="r1"
    )


def spend(ledger: Ledger, terms: Mechanism, client_id: str = "ada") -> BudgetSpent:
    """Record one more spend, as the log gives it back."""
    number = len(ledger.spends(client_id))
    made = make(ledger, terms, client_id, number)
    read = record(made, number + 1)
    decoded = envelope.expect(read, BudgetSpent)
    ledger.apply(read, decoded)
    return decoded


def chain(length: int, client_id: str = "ada") -> list[BudgetSpent]:
    ledger = Ledger()
    return [spend(ledger, mechanism(steps=1 + n), client_id) for n in range(length)]


def fold(payloads: list[BudgetSpent]) -> Ledger:
    ledger = Ledger()
    for number, payload in enumerate(payloads):
        ledger.apply(record(payload, number + 1), payload)
    return ledger


def test_spends_form_a_chain_from_the_empty_hash() -> None:
    first, second, third = chain(3)
    assert (first.spend_seq, first.previous) == (0, "")
    assert (second.spend_seq, second.previous) == (1, spend_sha256(first))
    assert (third.spend_seq, third.previous) == (2, spend_sha256(second))


def test_the_hash_is_that_of_the_bytes_in_the_log() -> None:
    (first,) = chain(1)
    assert spend_sha256(first) == hashlib.sha256(record(first).data).hexdigest()


def test_mechanisms_of_a_whole_life_are_composed_jointly_for_each_client_alone() -> None:
    ledger = Ledger()
    for _ in range(3):
        spend(ledger, mechanism(), "ada")
    spend(ledger, mechanism(), "bob")
    assert ledger.spent("ada") == (mechanism(),) * 3
    assert ledger.epsilon("ada", DELTA) == accounting.epsilon([mechanism()] * 3, DELTA)
    assert ledger.would_be("bob", mechanism(), DELTA) == accounting.epsilon([mechanism()] * 2, DELTA)
    assert ledger.epsilon("nobody", DELTA) == 0


def test_other_events_of_the_topic_change_nothing() -> None:
    ledger = Ledger()
    masked = TextMasked(origin="home", client_id="ada", seq=0, feedback_id="f")
    assert masked.topic == topics.AUDIT
    ledger.apply(record(masked), masked)
    assert ledger.to_state() == Ledger().to_state()


def test_a_reused_number_with_other_content_suspends_and_both_spends_count() -> None:
    spends = chain(3)
    clone = msgspec.structs.replace(spends[1], mechanism=mechanism(steps=50))
    ledger = fold([*spends, clone])
    evidence = ledger.suspended("ada")
    assert evidence is not None
    assert (evidence.reason, evidence.spend_seq, evidence.event_id) == ("spend-reused", 1, instruction(4))
    assert len(ledger.spent("ada")) == 4
    assert reason(ledger.check("ada", mechanism(), 100.0, DELTA)) == "client-suspended"
    assert reason(ledger.check("ada", None, None, DELTA)) == "client-suspended"
    assert ledger.suspended("bob") is None


@pytest.mark.parametrize("change", [{"previous": "0" * 64}, {"previous": ""}, {"spend_seq": 3}])
def test_a_spend_that_does_not_continue_the_chain_suspends_and_counts(change: dict[str, str | int]) -> None:
    first, second, third = chain(3)
    torn = msgspec.structs.replace(third, **change)
    ledger = fold([first, second, torn])
    evidence = ledger.suspended("ada")
    assert evidence is not None
    assert evidence.reason == "chain-broken"
    assert len(ledger.spent("ada")) == 3


def test_a_suspension_is_for_good_and_keeps_its_first_evidence() -> None:
    spends = chain(4)
    fork = msgspec.structs.replace(spends[0], seq=99)
    ledger = fold([*spends[:2], fork])
    first = ledger.suspended("ada")
    for payload in (*spends[2:], msgspec.structs.replace(spends[1], seq=98)):
        ledger.apply(record(payload, 50), payload)
    assert ledger.suspended("ada") == first
    assert len(ledger.spent("ada")) == 6  # every distinct one, so that the worst that can have happened is in epsilon


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=12), st.randoms(use_true_random=False))
def test_replays_at_any_later_time_are_harmless(length: int, repeats: list[int], order: random.Random) -> None:
    spends = chain(length)
    history: list[BudgetSpent] = list(spends)
    for index in repeats:
        original = spends[index % length]
        history.insert(order.randint(history.index(original) + 1, len(history)), original)
    replayed, once = fold(history), fold(spends)
    assert replayed.suspended("ada") is None
    assert [s.sha256 for s in replayed.spends("ada")] == [s.sha256 for s in once.spends("ada")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=12), st.integers(0, 12))
def test_folding_from_a_snapshot_gives_the_same_as_folding_from_the_start(picks: list[int], cut: int) -> None:
    known = [*chain(4), *chain(4, "bob")]
    history = [known[pick] for pick in picks]  # gaps and repeats among them
    whole, start = fold(history), fold(history[:cut])
    resumed = Ledger.from_state(start.to_state())
    for number, payload in enumerate(history[cut:], start=cut):
        resumed.apply(record(payload, number + 1), payload)
    assert resumed.to_state() == whole.to_state()


wanted = st.builds(mechanism, st.sampled_from([0.1, 0.3, 1.0]), st.sampled_from([0.9, 2.0, 6.0]), st.integers(1, 30))


@settings(max_examples=15, deadline=None)
@given(st.lists(wanted, max_size=8), st.sampled_from([0.5, 2.0, 8.0]))
def test_no_sequence_of_accepted_spends_exceeds_the_budget(asked: list[Mechanism], budget: float) -> None:
    ledger = Ledger()
    for terms in asked:
        refusal = ledger.check("ada", terms, budget, DELTA)
        if refusal is None:
            spend(ledger, terms)
        else:
            assert refusal.reason == "budget-exceeded"
            assert refusal.would_be_epsilon is not None
            assert refusal.would_be_epsilon > budget
        assert ledger.epsilon("ada", DELTA) <= budget
    assert accounting.epsilon(ledger.spent("ada"), DELTA) <= budget


def test_all_rounds_of_a_plan_are_accepted_and_one_more_is_not() -> None:
    plan = ClassificationPlan(planned_rounds=4, sampling_rate=0.1, nominal_examples=400, sums_share=0.5).mechanisms()
    sums, training = plan["sums"], plan["ffa"]
    ledger = Ledger()
    for terms in (sums, training, training, training):
        assert ledger.check("ada", terms, 8.0, DELTA) is None
        spend(ledger, terms)
    assert reason(ledger.check("ada", training, 8.0, DELTA)) == "budget-exceeded"
    assert reason(ledger.check("ada", sums, 8.0, DELTA)) == "budget-exceeded"


def reason(refusal: BudgetRefusal | None) -> str | None:
    return None if refusal is None else refusal.reason


def test_a_budget_forbids_rounds_without_differential_privacy_and_its_absence_allows_all() -> None:
    ledger = Ledger()
    assert reason(ledger.check("ada", None, 8.0, DELTA)) == "no-budget"
    assert ledger.check("ada", None, None, DELTA) is None
    assert ledger.check("ada", mechanism(noise_multiplier=0.1), None, DELTA) is None


def test_an_update_counts_only_with_the_spend_that_pays_for_it() -> None:
    ledger, terms = Ledger(), mechanism()
    spend(ledger, terms)
    spend(ledger, mechanism(steps=6))
    good = ("ada", 0, instruction(0), terms, 8.0, DELTA)
    assert ledger.check_update(*good) is None
    for update, code in (
        (("ada", None, instruction(0), terms, 8.0, DELTA), "spend-missing"),
        (("ada", 2, instruction(0), terms, 8.0, DELTA), "spend-missing"),
        (("bob", 0, instruction(0), terms, 8.0, DELTA), "spend-missing"),
        (("ada", 1, instruction(0), terms, 8.0, DELTA), "mechanism-mismatch"),
        (("ada", 0, instruction(1), terms, 8.0, DELTA), "mechanism-mismatch"),
        (("ada", 0, instruction(0), mechanism(steps=4), 8.0, DELTA), "mechanism-mismatch"),
        (("ada", 0, instruction(0), terms, 0.1, DELTA), "budget-exceeded"),
        (("ada", None, instruction(0), None, 8.0, DELTA), "no-budget"),
    ):
        assert reason(ledger.check_update(*update)) == code
    assert ledger.check_update("ada", None, instruction(0), None, None, DELTA) is None


def test_a_later_spend_does_not_undo_an_update_that_was_within_budget() -> None:
    ledger, terms = Ledger(), mechanism()
    spend(ledger, terms)
    within = ledger.epsilon("ada", DELTA)
    spend(ledger, mechanism(noise_multiplier=0.5))
    assert ledger.check_update("ada", 0, instruction(0), terms, within, DELTA) is None
    assert reason(ledger.check_update("ada", 1, instruction(1), mechanism(noise_multiplier=0.5), within, DELTA)) == (
        "budget-exceeded"
    )


def test_the_spend_for_an_instruction_is_found_so_that_nobody_trains_for_it_twice() -> None:
    ledger = Ledger()
    assert ledger.spend_for("ada", instruction(0)) is None
    spend(ledger, mechanism())
    found = ledger.spend_for("ada", instruction(0))
    assert found is not None
    assert (found.spend_seq, found.mechanism) == (0, mechanism())


def test_what_the_ledger_hands_out_cannot_change_it() -> None:
    ledger = Ledger()
    spend(ledger, mechanism())
    before = ledger.to_state()
    assert isinstance(ledger.spends("ada"), tuple)
    ledger.epsilon("somebody else", DELTA)
    assert ledger.to_state() == before

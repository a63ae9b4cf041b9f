"""The view of what there is to train on: what was withdrawn counts never again, whatever comes twice or late."""

from __future__ import annotations

from collections.abc import Sequence

import samples
from fedloop_events import types
from fedloop_events.folds.training import TrainingView
from fedloop_events.ids import derived_id
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.integers(0, 3)
TRAINING = st.lists(st.tuples(st.booleans(), NUMBERS))
"""Whether an example is curated or withdrawn, and which."""


def payload(curated: bool, number: int) -> types.Payload:
    identity = derived_id("example", number)
    if not curated:
        return types.ExampleWithdrawn(samples.ORIGIN, "support", identity)
    text = samples.masked("where is my card")
    return types.ExampleCurated(samples.ORIGIN, "support", identity, "label", "c1", f"f{number}", identity, "r0", text, label="a")


def view_of(said: Sequence[tuple[bool, int]], *, restoring: bool = False) -> TrainingView:
    view = TrainingView()
    for at, each in enumerate(said):
        view.apply(samples.record(samples.event(payload(*each), at), at), payload(*each))
        view = TrainingView.from_state(view.to_state()) if restoring else view
    return view


@given(TRAINING)
def test_an_example_counts_unless_it_was_ever_withdrawn(said: list[tuple[bool, int]]) -> None:
    back = {number for curated, number in said if not curated}
    counts = dict.fromkeys(number for curated, number in said if curated and number not in back)
    assert sorted(view_of(said).examples) == sorted(derived_id("example", number) for number in counts)


@given(TRAINING)
def test_a_restored_view_goes_on_as_if_it_had_not_been_stored(said: list[tuple[bool, int]]) -> None:
    plain, restored = view_of(said), view_of(said, restoring=True)
    assert restored == plain
    assert list(restored.examples) == list(plain.examples)

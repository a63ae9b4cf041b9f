"""What a device has paid for and could not answer: a crash between spend and answer costs the round, and is not refunded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from fedloop_privacy.dp import accounting
from msgspec import Struct

from fedloop_clients.device_view import DeviceView
from fedloop_clients.eligibility import DAY_S
from fedloop_clients.enrolment import Identity

_SUBMITTED: Final = "submitted"


class CutShort(Struct, frozen=True):
    """A round that was paid for and not answered, for the `reason` that an answer of "interrupted" or another decline gives.

    It cost `epsilon`, for life; `pays_again` says whether the budget has room for another round on the same terms. While the
    round is `open`, until its `RoundClosed` or `RoundAborted`, the device takes no further part in it; for `counts_s` seconds
    more, by the server's decisions, it is one of the owner's rounds a day.
    """

    round_id: str
    reason: str
    epsilon: float
    pays_again: bool
    open: bool
    counts_s: float

    @property
    def sentence(self) -> str:
        """The same in words."""
        until = "it takes no further part in it until its RoundClosed or RoundAborted; " if self.open else ""
        again = "" if self.pays_again else ", and its budget does not pay for another such round"
        return (
            f"round {self.round_id} was paid for and cut short before its answer ({self.reason}): {until}"
            f"it counts as a round of the day for {max(self.counts_s, 0):,.0f} s more; its epsilon of {self.epsilon:.3f} is "
            f"spent for life{again}"
        )


def cut_short(view: DeviceView, me: Identity, outcomes: Mapping[str, str], *, runs: bool) -> list[CutShort]:
    """Those that still hold the device up: of an open round, or of the last 24 hours. `outcomes` are those of the instructions
    that the store knows as answered; where a loop `runs`, what has none is being answered."""
    return list(_cut_short(view, me, outcomes, runs=runs))


def _cut_short(view: DeviceView, me: Identity, outcomes: Mapping[str, str], *, runs: bool) -> Iterator[CutShort]:
    spends = view.ledger.spends(me.client_id)
    for instruction_id, spent in view.spent.items():
        outcome = outcomes.get(instruction_id)
        if spent.answered or outcome == _SUBMITTED or (outcome is None and runs):
            continue
        is_open, counts_s = spent.round_id in view.rounds, DAY_S - (view.now_ms - spent.spent_ms) / 1000
        if not is_open and counts_s <= 0:
            continue
        mechanism = next(each.mechanism for each in spends if each.event_id == spent.event_id)
        others = [each.mechanism for each in spends if each.event_id != spent.event_id]
        again = view.ledger.would_be(me.client_id, mechanism, me.delta)
        yield CutShort(
            round_id=spent.round_id or "",
            reason=outcome or "interrupted",
            epsilon=accounting.epsilon([*others, mechanism], me.delta)
            - (accounting.epsilon(others, me.delta) if others else 0.0),
            pays_again=me.epsilon is None or again <= me.epsilon,
            open=is_open,
            counts_s=counts_s,
        )

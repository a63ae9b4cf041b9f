"""Which rounds are asked for or run, in a bounded state: what `RoundsView` keeps for ever."""

from __future__ import annotations

from typing import Final

from fedloop_events import types
from msgspec import Struct

MAX_REQUESTS: Final = 1_000
MAX_OVER: Final = 16


class UnderWay(Struct):
    """The requests that wait, oldest first, and the round that is open or whose release is not decided.

    Rests on order within the topic `rounds` and within `releases`, and on none between the two.
    """

    requests: dict[str, int] = {}
    """How many rounds are still to be opened, by request; at most `MAX_REQUESTS` requests."""
    round_id: str = ""
    round_request: str = ""
    """What it was opened for."""
    proposed: dict[str, str] = {}
    """Round by candidate; the last `MAX_OVER`."""
    over: list[str] = []
    """The last `MAX_OVER` rounds that were aborted, or whose release was decided."""

    @property
    def request(self) -> str:
        """The request that a further wish for a round is served with; "" if none waits or runs."""
        return next(iter(self.requests), "") or self.round_request

    def ask(self, request_id: str, rounds: int) -> None:
        if len(self.requests) < MAX_REQUESTS:
            self.requests.setdefault(request_id, rounds)

    def apply(self, payload: types.Payload) -> None:
        match payload:
            case types.RoundRequested():
                self.ask(payload.request_id, payload.rounds)
            case types.RoundRequestWithdrawn():
                self.requests.pop(payload.request_id, None)
            case types.RoundOpened():
                self._opened(payload)
            case types.RoundAborted():
                if payload.round_id not in (self.round_id, *self.over) and self.requests:
                    del self.requests[next(iter(self.requests))]  # given up before it was opened, and its request with it
                self._end(payload.round_id)
            case types.ReleaseProposed(round_id=str(round_id)):
                self.proposed[payload.release] = round_id
                if len(self.proposed) > MAX_OVER:
                    del self.proposed[next(iter(self.proposed))]
            case types.ReleasePublished() | types.ReleaseRejected():
                self._end(self.proposed.pop(payload.release, ""))
            case _:
                pass

    def _opened(self, opened: types.RoundOpened) -> None:
        left = self.requests.get(opened.request_id, 1) - 1
        if left > 0:
            self.requests[opened.request_id] = left
        else:
            self.requests.pop(opened.request_id, None)
        if opened.round_id not in self.over:
            self.round_id, self.round_request = opened.round_id, opened.request_id

    def _end(self, round_id: str) -> None:
        self.over = [*self.over, round_id][-MAX_OVER:]
        if round_id == self.round_id:
            self.round_id = self.round_request = ""

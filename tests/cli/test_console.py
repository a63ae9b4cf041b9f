"""What the command line prints for people, and when it keeps still."""

from __future__ import annotations

import pytest
from fedloop_cli import console
from fedloop_cli.waiting import Waiting
from fedloop_server.operations.awaiting import Awaited


def test_fields_show_counts_in_words_and_a_dash_for_nothing() -> None:
    shown = console.fields(
        {"answers": {"submitted": 2, "declined": 1}, "failed": {}, "problem": "", "suspended": None, "unsent": 0}
    )
    values = [line.split("  ")[-1].strip() for line in shown.splitlines()]
    assert values == ["2 submitted, 1 declined", "-", "-", "-", "0"]


def test_a_server_that_has_just_decided_something_is_not_yet_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = Waiting(clock=lambda: 0.0)
    for decided_s, lines in ((0.5, 0), (6.0, 1), (7.0, 0), (0.1, 0), (None, 2)):
        waiting.show(Awaited("server", round_id="r0001", epoch=0 if decided_s is None else 1, decided_s=decided_s))
        assert len(capsys.readouterr().err.splitlines()) == lines
    waiting.show(Awaited("updates", round_id="r0002", missing=["ann"], asked=2, quorum=2, epoch=1, decided_s=0.1))
    assert capsys.readouterr().err.startswith("waiting: r0002 waits for ann: 0 of 2 have answered")

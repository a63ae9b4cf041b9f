"""The demo's live view on standard error: a table that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedloop_server.operations.rounds import summaries

from fedloop_cli import console, documents
from fedloop_cli.demo.play import Scene

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextmanager
def view(scene: Scene) -> Iterator[Callable[[], None]]:
    """Gives a function that shows what has changed."""
    if not sys.stderr.isatty():
        yield _lines(scene)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(_picture(scene), console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda: live.update(_picture(scene), refresh=True)


def _lines(scene: Scene) -> Callable[[], None]:
    doing, shown = "", 0

    def refresh() -> None:
        nonlocal doing, shown
        if scene.doing != doing:
            doing = scene.doing
            console.note(f"{scene.seconds:6.1f} s  {doing}")
        for line in scene.events[shown:]:
            console.note(line)
        shown = len(scene.events)

    return refresh


def _picture(scene: Scene) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    devices = Table(title=f"{scene.doing}, {scene.seconds:.0f} s", title_justify="left", box=None, pad_edge=False)
    for head in ("device", "messages", "", "this round"):
        devices.add_column(head)
    for name, messages in zip(scene.devices, scene.users.devices, strict=True):
        given = scene.progress[name].given
        filled = round(20 * given / max(1, len(messages)))
        bar = "█" * filled + "░" * (20 - filled)
        devices.add_row(name, f"{given} of {len(messages)}", bar, doing(scene, name))
    parts: list[RenderableType] = [devices]
    if scene.followed is not None and scene.followed.rounds.rounds:
        rounds, found = Table(box=None, pad_edge=False), summaries(scene.followed)
        leads = documents.leading(each.evaluation for each in found)
        for head in (
            "round",
            "state",
            "kind",
            "took part",
            documents.readable(leads) or documents.NO_METRIC,
            "seconds",
            "opened for",
        ):
            rounds.add_column(head)
        for each in found:
            value = documents.metric_of(each.evaluation, leads)
            figure = "" if value is None else f"{value:.3f}"
            took_s = documents.seconds(each.took_ms)
            seconds = "" if took_s is None else f"{took_s:.1f}"
            rounds.add_row(each.round_id, each.state, each.kind, f"{len(each.participants)}", figure, seconds, each.reason)
        parts.append(rounds)
    parts += [Text(line) for line in scene.events[-5:]]
    return Group(*parts)


def doing(scene: Scene, name: str) -> str:
    """What a device does in the open round."""
    if name not in scene.ready:
        return "starting"
    opened = None if scene.followed is None else scene.followed.rounds.open_round
    if opened is None or opened.opened is None:
        return ""
    if name in opened.replies:
        return "submitted"
    if name in opened.declined:
        return f"declined: {opened.declined[name]}"
    return "training" if name in opened.opened.cohort else "not asked"

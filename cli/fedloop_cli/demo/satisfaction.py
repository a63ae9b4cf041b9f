"""How content the demo's users were as it went on: what the pipeline scored, and what came of it, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import EventLog
from fedloop_server.feedback.lake.place import locate
from fedloop_server.feedback.lake.sync import Lake
from fedloop_server.operations import examples, metrics
from msgspec import Struct

from fedloop_cli.commands import feedback_stats
from fedloop_cli.options import Where

FILE_NAME: Final = "satisfaction.png"
COLUMNS: Final = 72
LATEST: Final = 100
"""Pieces of feedback whose mean a point of the picture is."""
_SIGNS: Final = {"drift": "!", "requested": "?", "published": "^"}
_WORDS: Final = {"drift": "drift of", "requested": "a round requested,", "published": "published"}


class Mark(Struct, frozen=True):
    """Something that happened after so many pieces of feedback."""

    after: int
    what: Literal["drift", "requested", "published"]
    text: str


class Course:
    """A fold: each piece of feedback that says how content its user was, from 0 to 1, and what happened meanwhile."""

    topics = (topics.SCORED, topics.METRICS, topics.QUARANTINE, topics.ROUNDS, topics.RELEASES)

    def __init__(self) -> None:
        self.satisfaction: list[float] = []
        self.marks: list[Mark] = []
        self.drifts: list[types.DriftDetected] = []
        self.quarantined = 0

    def apply(self, record: Record, payload: types.Payload) -> None:
        after = len(self.satisfaction)
        match payload:
            case types.FeedbackScored(satisfaction=float() | int() as satisfaction):
                self.satisfaction.append(satisfaction)
            case types.EventQuarantined():
                self.quarantined += 1
            case types.DriftDetected():
                self.drifts.append(payload)
                self.marks.append(Mark(after, "drift", f"{payload.metric} ({', '.join(payload.detectors)})"))
            case types.RoundRequested():
                self.marks.append(Mark(after, "requested", payload.reason))
            case types.ReleasePublished() if after:
                self.marks.append(Mark(after, "published", payload.release))
            case _:
                pass

    def line(self) -> list[float]:
        """The mean of the latest pieces of feedback, after each."""
        sums = np.cumsum([0.0, *self.satisfaction])
        first = np.maximum(np.arange(len(self.satisfaction)) + 1 - LATEST, 0)
        after = np.arange(1, len(self.satisfaction) + 1)
        return [float(mean) for mean in (sums[after] - sums[first]) / (after - first)]


def course(log: EventLog) -> Course:
    """What the log says of it now."""
    reader = Reader(log, Course(), identities=Identities())
    reader.catch_up()
    return reader.fold


def document(where: Where, found: Course) -> dict[str, Any]:
    """What the pipeline made of the feedback; the lake is made for it, in the deployment's folder."""
    log = where.open_log()
    with Lake(log, locate(where.directory, None)) as lake:
        lake.catch_up()
        rows = sum(each.added for each in lake.counts.values())
    return {
        "windows": [feedback_stats.document(each) for each in metrics.current(log)],
        "drift": [msgspec.to_builtins(each) for each in found.drifts],
        "curated": len(examples.curated(log)),
        "quarantined": found.quarantined,
        "lake_rows": rows,
    }


def as_text(found: Course) -> str:
    """A line of blocks, the higher the more content, and under it what happened where; "" if nothing was scored."""
    total = len(found.satisfaction)
    if not total:
        return ""
    columns = min(COLUMNS, total)
    means = [float(np.mean(part)) for part in np.array_split(found.satisfaction, columns)]
    blocks = feedback_stats.sparkline(means)
    signs = [" "] * (columns + 1)
    for mark in found.marks:
        signs[mark.after * columns // total] = _SIGNS[mark.what]
    happened = [f"  {_SIGNS[mark.what]} after {mark.after}: {_WORDS[mark.what]} {mark.text}" for mark in found.marks]
    return "\n".join([f"SATISFACTION, over {total} pieces of feedback", blocks, "".join(signs).rstrip(), *happened])


def draw(found: Course, path: Path) -> None:
    """The same as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(found.satisfaction) + 1), found.line(), color="tab:blue", label=f"mean of the latest {LATEST}")
    looks = {"drift": ("tab:red", ":"), "requested": ("tab:gray", "--"), "published": ("tab:green", "-")}
    named: set[str] = set()
    for mark in found.marks:
        color, style = looks[mark.what]
        label = {"drift": "drift detected", "requested": "round requested", "published": "release published"}[mark.what]
        axes.axvline(mark.after, color=color, linestyle=style, linewidth=1, label=None if mark.what in named else label)
        named.add(mark.what)
    axes.set(xlabel="pieces of feedback", ylabel="satisfaction", ylim=(0, 1), xlim=(0, max(1, len(found.satisfaction))))
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=120)

"""The demo's end: four checks, each really made, and what happened, for a person and as a document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from fedloop_events import locations, topics, types
from fedloop_events.blobs import tensors
from fedloop_events.envelope import decode
from fedloop_events.errors import FedloopError, InvalidEventError
from fedloop_events.folds.releases import Evaluation, ReleaseState
from fedloop_events.locations import SERVER_FOLDER
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import DEFAULT_MODEL
from fedloop_events.verify.log import verify
from fedloop_server.operations.budgets import Budget, budgets
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.registry import task_of_model
from fedloop_server.operations.rounds import RoundSummary, summaries
from fedloop_tasks.table import name_of
from msgspec import Struct

from fedloop_cli import console, documents
from fedloop_cli.demo import leaks, satisfaction
from fedloop_cli.demo.play import Scene
from fedloop_cli.options import Where


class Checks(Struct):
    """What was checked. `leaks` are planted values that were found in any byte of the deployment, by type."""

    log_verified: bool
    rebuilt_identical: bool
    leaks: dict[str, int]
    budgets_kept: bool


class Compared(Struct):
    """An answer of the first release to a held-out prompt, that of the one in force, and the one that is wanted."""

    prompt: str
    before: str
    after: str
    wanted: str


class DemoReport(Struct):
    """Everything that the demo prints at its end."""

    task: str
    log: str
    directory: str
    rounds: list[RoundSummary]
    baseline: Evaluation | None
    """Of the first release."""
    final: Evaluation | None
    """Of the one in force."""
    budgets: list[Budget]
    examples: dict[str, int]
    masked: dict[str, dict[str, int]]
    checks: Checks
    found: list[tuple[str, str]]
    """Where each leaked value stands, with its type: never the value."""
    planted: dict[str, int]
    why: list[str]
    """Why a check failed."""
    seconds: float
    samples: list[Compared]
    feedback: dict[str, Any]
    """What the pipeline made of it, as a document."""
    satisfaction: str
    """How content users were, in blocks."""
    picture: str

    @property
    def good(self) -> bool:
        """Whether every round made a release and every check held. A leak is counted and shown: masking promises no more."""
        checks = self.checks
        rounds = all(each.state != "aborted" for each in self.rounds)
        return rounds and checks.log_verified and checks.rebuilt_identical and checks.budgets_kept


def report(scene: Scene) -> DemoReport:
    """Check everything. What the processes printed, and this demo itself, is in the deployment's folder and searched with it."""
    where, why = scene.where, []
    followed = where.follow()
    log = followed.log
    verified = verify(where.place, lambda: log, where.open_blobs)
    why += [f"log, offset {console.offset(each.stream, each.offset or 0)}: {each.what}" for each in verified.findings[:5]]
    identical, reason = _rebuilt(where, log, followed)
    why += [reason] if reason else []
    spent = budgets(followed)
    course, picture = satisfaction.course(log), scene.directory / satisfaction.FILE_NAME
    satisfaction.draw(course, picture)
    feedback = satisfaction.document(where, course)
    found = _leaks(scene, log)
    current = followed.releases.current(DEFAULT_MODEL)
    first = next(iter(followed.releases.releases.values()), None)
    made = DemoReport(
        name_of(scene.task),
        where.place.log if locations.is_url(where.place.log) else str(Path(where.place.log) / locations.LOG_FILE),
        str(scene.directory),
        summaries(followed),
        first.evaluation if first is not None else None,
        current.evaluation if current is not None else None,
        spent,
        {name: progress.given for name, progress in scene.progress.items()},
        _masked(log),
        Checks(verified.verified, identical, leaks.by_type(found), all(each.kept for each in spent)),
        [(kind, where) for (kind, _), where in found.items()],
        leaks.by_type(_needles(scene).values),
        why,
        round(scene.seconds, 1),
        _samples(scene, first, current),
        feedback,
        satisfaction.as_text(course),
        str(picture),
    )
    printed = "\n".join([as_text(made), *scene.events]).encode() + msgspec.json.encode(as_document(made))
    for value in _needles(scene).found_in(printed, binary=False):
        found.setdefault(value, "this report")
    made.checks.leaks = leaks.by_type(found)
    return made


def as_document(report: DemoReport) -> dict[str, Any]:
    """What `fedloop demo --json` prints."""
    return {
        "task": report.task,
        "log": report.log,
        "rounds": [
            {
                "round_id": each.round_id,
                "reason": each.reason,
                "release": each.release,
                **documents.metrics_document(each.evaluation),
                "participants": each.participants,
                "excluded": [{"client": out.client_id, "reason": out.reason} for out in each.excluded],
                "seconds": documents.seconds(each.took_ms),
                "bytes_up": each.bytes_up,
                "bytes_down": each.bytes_down,
            }
            for each in report.rounds
        ],
        "baseline_accuracy": documents.metric_of(report.baseline, "accuracy"),
        "final_accuracy": documents.metric_of(report.final, "accuracy"),
        "baseline_metrics": {} if report.baseline is None else report.baseline.metrics,
        "final_metrics": {} if report.final is None else report.final.metrics,
        "leading": documents.leading([report.baseline, report.final]) or None,
        "clients": [
            {
                "client_id": each.client_id,
                "examples": report.examples.get(each.client_id, 0),
                "epsilon": each.epsilon,
                "delta": each.delta,
                "budget": each.budget,
                "masked": report.masked.get(each.client_id, {}),
            }
            for each in report.budgets
        ],
        "samples": msgspec.to_builtins(report.samples),
        "feedback": report.feedback | {"picture": report.picture},
        "checks": msgspec.to_builtins(report.checks),
        "seconds": report.seconds,
    }


def as_text(report: DemoReport) -> str:
    """The same for a person."""
    parts = [
        _rounds(report),
        *_metrics(report),
        *_answers(report),
        *_feedback(report),
        _clients(report),
        _masking(report),
        _checks(report),
    ]
    leads = documents.leading([report.baseline, report.final])
    before, after = (_figure(documents.metric_of(each, leads)) for each in (report.baseline, report.final))
    changed = f"{documents.readable(leads) or documents.NO_METRIC} {before} before, {after} after"
    log = f", the log {report.log}" if locations.is_url(report.log) else ""
    parts.append(f"{changed}; {report.seconds:.0f} s; everything is in {report.directory}{log}")
    return "\n\n".join(parts)


def _rounds(report: DemoReport) -> str:
    leads = documents.leading(each.evaluation for each in report.rounds)
    metric = documents.readable(leads) or documents.NO_METRIC
    heads = ["round", "kind", "took part", metric, "release", "seconds", "up", "down", "excluded", "opened for"]
    rows = [
        [
            each.round_id,
            each.kind,
            len(each.participants),
            _figure(documents.metric_of(each.evaluation, leads)),
            each.release or f"{each.state}: {each.aborted or each.decision}",
            documents.seconds(each.took_ms),
            _size(each.bytes_up),
            _size(each.bytes_down),
            ", ".join(f"{out.client_id} ({out.reason})" for out in each.excluded) or "nobody",
            each.reason,
        ]
        for each in report.rounds
    ]
    return "ROUNDS\n" + console.table(heads, rows, empty="none")


def _metrics(report: DemoReport) -> list[str]:
    """Where there are several."""
    before, after = ({} if each is None else each.metrics for each in (report.baseline, report.final))
    rows = [[documents.readable(name), _figure(before.get(name)), _figure(value)] for name, value in after.items()]
    return ["METRICS\n" + console.table(["held-out", "before", "after"], rows)] if len(rows) > 1 else []


def _answers(report: DemoReport) -> list[str]:
    rows = [
        line
        for each in report.samples
        for line in (f"> {each.prompt}", f"  before  {each.before}", f"  after   {each.after}", f"  wanted  {each.wanted}")
    ]
    return ["ANSWERS\n" + "\n".join(console.printable(line) for line in rows)] if rows else []


def _feedback(report: DemoReport) -> list[str]:
    found = report.feedback
    counts = (
        f"{found['curated']} curated, {found['quarantined']} held back by the second gate, {found['lake_rows']} rows in the lake"
    )
    return [f"{report.satisfaction}\n{counts}; as a picture: {report.picture}"] if report.satisfaction else []


def _clients(report: DemoReport) -> str:
    heads = ["device", "messages", "epsilon spent", "budget", "delta"]
    rows = [
        [
            each.client_id,
            report.examples.get(each.client_id, 0),
            f"{each.epsilon:.3f}" if each.budget is not None else "no privacy",
            each.budget,
            f"{each.delta:g}",
        ]
        for each in report.budgets
    ]
    return "DEVICES\n" + console.table(heads, rows)


def _masking(report: DemoReport) -> str:
    total: Counter[str] = Counter()
    for counts in report.masked.values():
        total.update(counts)
    return "MASKED\n" + console.table(["type", "spans"], total.most_common(), empty="nothing was found to mask")


def _checks(report: DemoReport) -> str:
    checks, planted = report.checks, sum(report.planted.values())
    leaked = sum(checks.leaks.values())
    if not planted:
        leaks_line = "leaks: nothing was planted in these messages, so none can be searched for"
    elif not leaked:
        leaks_line = f"ok     none of {planted:,} planted personal values stands in any byte of the log, the blobs or the output"
    else:
        by_type = ", ".join(f"{count} of {report.planted[kind]} {kind}" for kind, count in checks.leaks.items())
        leaks_line = f"LEAKED {leaked:,} of {planted:,} planted personal values passed the masker: {by_type}"
    lines = [
        _line(checks.log_verified, "the log is intact: every event by its author, none missing, every blob as its name says"),
        _line(checks.rebuilt_identical, "the last release, rebuilt from the log, has the same bytes"),
        leaks_line,
        _line(checks.budgets_kept, "no device has spent more than its budget"),
        *(f"       {console.printable(reason)}" for reason in report.why),
    ]
    return "CHECKS\n" + "\n".join(lines)


def _line(held: bool, what: str) -> str:
    return f"{'ok    ' if held else 'FAILED'} {what}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def _samples(scene: Scene, first: ReleaseState | None, current: ReleaseState | None) -> list[Compared]:
    """What the server has kept of both, prompt by prompt."""
    if scene.followed is None or first is None or current is None:
        return []
    task, folder, blobs = (
        task_of_model(scene.followed.releases, DEFAULT_MODEL),
        scene.directory / SERVER_FOLDER,
        scene.where.open_blobs(),
    )
    before, after = (task.samples(folder, tensors.decode(blobs.get(each.blob))) for each in (first, current))
    return [Compared(old.prompt, old.answer, new.answer, new.wanted) for old, new in zip(before, after, strict=False)]


def _rebuilt(where: Where, log: EventLog, followed: Followed) -> tuple[bool, str]:
    from fedloop_server.rounds.rebuild import rebuild

    if not any(each.round_id for each in followed.releases.releases.values()):
        return False, "no round made a release that could be rebuilt"
    try:
        return rebuild(log, where.open_blobs(), deep=True).identical, ""
    except FedloopError as error:
        return False, f"rebuild: {error.message}"


def _leaks(scene: Scene, log: EventLog) -> dict[leaks.Value, str]:
    return leaks.search(scene.directory, log, scene.where.open_blobs(), _needles(scene)) if scene.users.planted else {}


def _needles(scene: Scene) -> leaks.Needles:
    return leaks.Needles(scene.users.planted, scene.users.ordinary)


def _masked(log: EventLog) -> dict[str, dict[str, int]]:
    """Masked spans by client and type, as the devices reported them."""
    masked: dict[str, Counter[str]] = {}
    for record in read_all(log, (topics.AUDIT,)):
        try:
            payload = decode(record)
        except InvalidEventError:
            continue
        if isinstance(payload, types.TextMasked):
            masked.setdefault(payload.client_id, Counter()).update(payload.counts)
    return {client: dict(sorted(counts.items())) for client, counts in sorted(masked.items())}

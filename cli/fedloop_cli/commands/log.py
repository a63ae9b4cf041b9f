"""`fedloop log`: read the log, check it, and fold it from scratch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_events.envelope import Record
    from fedloop_events.logs.port import EventLog
    from fedloop_events.verify.checks import Fault, VerifyReport
    from fedloop_server.operations.replaying import Replayed

app = options.group(help="Read the log, check it, replay it.")

TopicOption = Annotated[list[str] | None, typer.Option("--topic", help="Only this topic; can be given several times.")]


@app.command(cls=options.Command)
def tail(
    where: options.DeploymentFolder,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last events.")] = 20,
    topic: TopicOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended, until Ctrl-C.")] = False,
    json: options.Json = False,
) -> None:
    """Show the last events. With --follow, --json prints one document a line for each event."""
    from fedloop_events import topics

    wanted = tuple(topic or topics.ALL)
    show_end(where.open_log(), wanted, lines, _event, _line, {"log": where.place.log}, follow=follow, as_json=json)


@app.command(cls=options.Command)
def verify(where: options.DeploymentFolder, json: options.Json = False) -> None:
    """Check that the log is whole, each event signed by the author that it names, and each blob as its name promises.

    Opens it for reading only. Exit status 1 if anything may have been tampered with; 4 if the log is intact, but an enrolled
    client has signed what it may not: `fedloop server revoke` is the answer to it.
    """
    import msgspec
    from fedloop_events.errors import PolicyError
    from fedloop_events.verify.log import verify as verify_log

    report = verify_log(where.place, where.open_log, where.open_blobs)
    console.show(msgspec.to_builtins(report), lambda: _report(report), as_json=json)
    if not report.verified:
        raise typer.Exit(1)
    if report.client_wrong:
        raise typer.Exit(PolicyError.exit_status)


@app.command(cls=options.Command)
def replay(where: options.DeploymentFolder, json: options.Json = False) -> None:
    """Fold the whole log from scratch, and compare with the snapshots that are there.

    Exit status 1 if a snapshot differs from the log.
    """
    from fedloop_server.operations.replaying import replay as replay_log

    replayed = replay_log(where.open_log(), where.directory)
    document = _replayed_document(where.place.log, replayed)
    console.show(document, lambda: _replayed_text(where.place.log, replayed), as_json=json)
    if replayed.differing:
        raise typer.Exit(1)


def show_end(
    log: EventLog,
    wanted: Collection[str],
    lines: int,
    document: Callable[[Record], Mapping[str, object]],
    line: Callable[[Record], str],
    about: Mapping[str, object] = MappingProxyType({}),
    *,
    follow: bool,
    as_json: bool,
) -> None:
    """The last events of the topics `wanted`, in one document with what it is `about`; with `follow` one an event, and on."""
    from fedloop_server.operations import tail as operations

    end = operations.last(log, lines, wanted)
    if not follow:
        whole = {**about, "events": [document(each) for each in end.records]}
        console.show(whole, lambda: "\n".join(map(line, end.records)), as_json=as_json)
        return
    for record in chain(end.records, operations.follow(log, end.position, wanted)):
        console.show(document(record), line(record), as_json=as_json)


def _event(record: Record) -> dict[str, object]:
    import msgspec

    try:
        data: object = msgspec.json.decode(record.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        data = record.data.decode(errors="backslashreplace")
    return {
        "stream": record.stream,
        "offset": record.offset,
        "appended": console.moment(record.appended_ms),
        "topic": record.topic,
        "key": record.key,
        "id": record.id,
        "type": record.type,
        "source": record.source,
        "data": data,
    }


def _line(record: Record) -> str:
    kind = record.type.removeprefix("io.fedloop.")
    text = record.data.decode(errors="backslashreplace")
    shown = text if len(text) <= 160 or not sys.stdout.isatty() else text[:159] + "…"
    head = (
        f"{console.offset(record.stream, record.offset):>8}  {console.moment(record.appended_ms)}  {console.printable(kind):28}"
    )
    return f"{head}  {console.printable(record.key):20}  {console.printable(shown)}"


def _report(report: VerifyReport) -> str:
    lines = [
        console.fields(
            {
                "log": report.log,
                "events": f"{report.events:,} ({', '.join(f'{topic} {count:,}' for topic, count in report.by_topic.items())})",
                "clients": report.clients,
                "blobs": f"{report.blobs:,} read and hashed, {report.blob_bytes:,} bytes",
                "unknown types": report.unknown,
                "stale decisions": report.stale,
                **({"read again": report.repeated} if report.repeated else {}),
                **({"rivals of an id": report.rivals} if report.rivals else {}),
            }
        ),
        "",
    ]
    lines += _findings("WRONG", report.findings, report.wrong)
    lines += _findings("CLIENT", report.misconduct, report.client_wrong)
    if report.client_wrong:
        lines.append(
            f"Enrolled clients have signed {report.client_wrong:,} things that they may not: revoke who did it on purpose."
        )
    lines += [
        "The log is intact." if report.verified else f"{report.wrong:,} things are wrong.",
        f"Not seen by this check: {report.not_seen}.",
    ]
    return "\n".join(lines)


def _findings(kind: str, findings: list[Fault], count: int) -> list[str]:
    lines = []
    for finding in findings:
        where = "" if finding.offset is None else f"offset {console.offset(finding.stream, finding.offset)}: "
        lines.append(f"{kind}  {where}{console.printable(finding.what)}")
    return lines if count == len(findings) else [*lines, f"{kind}  and {count - len(findings):,} more"]


def _replayed_document(log: str, replayed: Replayed) -> dict[str, Any]:
    return {
        "log": log,
        "events": replayed.events,
        "seconds": replayed.took_ms / 1000,
        "types": replayed.types,
        "unknown": replayed.unknown,
        "refused": replayed.refused,
        "first_refused": replayed.first_refused,
        "epoch": replayed.epoch,
        "clients": replayed.clients,
        "revoked": replayed.revoked,
        "rounds": replayed.rounds,
        "releases": replayed.releases,
        "current": replayed.current,
        "stale_decisions": replayed.stale_decisions,
        "spends": replayed.spends,
        "suspended": replayed.suspended,
        "matching": replayed.matching,
        "differing": replayed.differing,
    }


def _replayed_text(log: str, replayed: Replayed) -> str:
    took_s = replayed.took_ms / 1000
    rate = replayed.events / took_s if took_s else 0.0
    rows: dict[str, object] = {
        "log": log,
        "events": f"{replayed.events:,} in {took_s:.1f} s ({rate:,.0f} a second)",
        "unknown types": replayed.unknown,
        "refused": replayed.refused,
        "epoch": replayed.epoch,
        "clients": f"{replayed.clients}, {replayed.revoked} revoked",
        "rounds": _counts(replayed.rounds),
        "releases": _counts(replayed.releases),
        "in force": replayed.current,
        "stale decisions": replayed.stale_decisions,
        "spends": replayed.spends,
        "suspended": ", ".join(replayed.suspended) or "nobody",
        "snapshots": f"{len(replayed.matching)} match the log, {len(replayed.differing)} differ",
    }
    lines = [console.fields(rows), "", console.table(["type", "events"], [list(each) for each in replayed.types.items()])]
    lines += [
        f"REFUSED  offset {console.offset(each.stream, each.offset)}: {console.printable(each.why)}"
        for each in replayed.first_refused
    ]
    lines += [f"DIFFERS  {console.printable(path)}" for path in replayed.differing]
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"

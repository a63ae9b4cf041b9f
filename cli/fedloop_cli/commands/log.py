"""`fedloop log`: read the log, check it, and fold it from scratch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_events.envelope import Record
    from fedloop_events.verify.checks import VerifyReport

app = options.group(help="Read the log, check it, replay it.")

Topic = Annotated[list[str] | None, typer.Option("--topic", help="Only this topic; can be given several times.")]


@app.command(cls=options.Command)
def tail(
    where: options.Deployment,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last events.")] = 20,
    topic: Topic = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended, until Ctrl-C.")] = False,
    json: options.Json = False,
) -> None:
    """Show the last events. With --follow, --json prints one document a line for each event."""
    from collections import deque

    from fedloop_events import topics
    from fedloop_events.errors import UsageError
    from fedloop_events.logs.port import START, read_all

    from fedloop_cli import state

    wanted = tuple(topic or topics.ALL)
    for name in wanted:
        if name not in topics.ALL:
            raise UsageError(f"there is no topic {name!r}", hint=f"the topics are {', '.join(topics.ALL)}")
    log = state.open_log(where)
    if not follow:
        last = deque(read_all(log, wanted), maxlen=lines)
        console.show(
            {"log": where.place.log, "events": [_event(each) for each in last]}, lambda: "\n".join(map(_line, last)), as_json=json
        )
        return
    position, batch = START, log.read(wanted, START, limit=10_000)
    kept: deque[Record] = deque(maxlen=lines)
    while batch.records:
        kept.extend(batch.records)
        position = batch.position
        batch = log.read(wanted, position, limit=10_000)
    found: list[Record] = list(kept)
    while True:
        for record in found:
            console.show(_event(record), _line(record), as_json=json)
        batch = log.read(wanted, position, wait_s=5.0)
        found, position = list(batch.records), batch.position


@app.command(cls=options.Command)
def verify(where: options.Deployment, json: options.Json = False) -> None:
    """Check that the log is whole, each event signed by the author that it names, and each blob as its name promises.

    Opens it for reading only. Exit status 1 if anything is wrong.
    """
    import msgspec
    from fedloop_events.verify.log import verify as verify_log

    from fedloop_cli import state

    report = verify_log(where.place, lambda: state.open_log(where), lambda: state.open_blobs(where))
    console.show(msgspec.to_builtins(report), lambda: _report(report), as_json=json)
    if not report.verified:
        raise typer.Exit(1)


@app.command(cls=options.Command)
def replay(where: options.Deployment, json: options.Json = False) -> None:
    """Fold the whole log from scratch, and compare with the snapshots that are there.

    Exit status 1 if a snapshot differs from the log.
    """
    from fedloop_cli import replaying

    replayed = replaying.replay(where)
    console.show(replaying.as_document(replayed), lambda: replaying.as_text(replayed), as_json=json)
    if replayed.differing:
        raise typer.Exit(1)


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
        f"{console.position(record.stream, record.offset):>8}  {console.moment(record.appended_ms)}  {console.printable(kind):28}"
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
    for finding in report.findings:
        where = "" if finding.offset is None else f"offset {console.position(finding.stream, finding.offset)}: "
        lines.append(f"WRONG  {where}{console.printable(finding.what)}")
    if report.wrong > len(report.findings):
        lines.append(f"WRONG  and {report.wrong - len(report.findings):,} more")
    lines += [
        "The log is intact." if report.verified else f"{report.wrong:,} things are wrong.",
        f"Not seen by this check: {report.not_seen}.",
    ]
    return "\n".join(lines)

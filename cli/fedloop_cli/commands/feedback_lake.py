"""`fedloop feedback lake`: the log as tables, for whoever analyses it."""

from __future__ import annotations

import csv
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_server.feedback.lake.query import Answer
    from fedloop_server.feedback.lake.sync import Counts, Lake

app = options.group(help="Make tables of the log, and ask them.")

LakeOption = Annotated[
    str | None, typer.Option(metavar="LOCATION", help="The lake: a folder, or s3://BUCKET/PREFIX.", show_default="DIR/lake")
]
_WAIT_S: Final = 5.0
"""How long events are gathered for a commit while the log is followed."""
_FEATURES_EVERY_S: Final = 60.0
"""The feature table is made anew as a whole."""


@app.command(cls=options.Command)
def sync(
    where: options.DeploymentFolder,
    lake: LakeOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended, until Ctrl-C.")] = False,
    json: options.Json = False,
) -> None:
    """Bring the lake's tables up to date with the log, and take out of them what was withdrawn.

    Killed at any point and started again, it goes on where it was. A lake can be deleted and made again from the log. With
    --follow, --json prints one document a line for each time that something changed.
    """
    from fedloop_server.feedback.lake.place import locate

    place = locate(where.directory, lake)
    from fedloop_server.feedback.lake.sync import Lake

    with Lake(where.open_log(), place) as opened:
        if follow:
            _follow(opened, place.location, as_json=json)
        else:
            opened.catch_up()
            _show(opened, place.location, as_json=json)


@app.command(cls=options.Command)
def query(
    where: options.DeploymentFolder,
    sql: Annotated[str, typer.Argument(metavar="SQL")],
    lake: LakeOption = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    json: options.Json = False,
) -> None:
    """Ask the lake's tables in DuckDB's SQL, as the last sync left them."""
    from fedloop_server.feedback.lake.place import locate

    place = locate(where.directory, lake)
    from fedloop_server.feedback.lake.query import query as ask

    answer = ask(place, sql)
    if as_csv and not json:
        _print_csv(answer)
        return
    rows = [list(each) for each in answer.rows]
    document = {"columns": answer.columns, "rows": rows}
    console.show(document, lambda: console.table(answer.columns, rows, empty="no rows"), as_json=json)


def _follow(lake: Lake, location: str, *, as_json: bool) -> None:
    from fedloop_cli.signals import stoppable

    due_s = time.monotonic()
    with stoppable() as stop:
        while not stop.event.is_set():
            fresh = time.monotonic() >= due_s
            changed = lake.catch_up(with_features=fresh)
            due_s = time.monotonic() + _FEATURES_EVERY_S if fresh else due_s
            if changed:
                _show(lake, location, as_json=as_json)
            stop.event.wait(_WAIT_S)
        lake.refresh_features()
    if stop.interrupted:
        raise typer.Exit(130)


def _show(lake: Lake, location: str, *, as_json: bool) -> None:
    console.show(_document(location, lake.counts), lambda: _text(location, lake.counts), as_json=as_json)


def _document(location: str, counts: dict[str, Counts]) -> dict[str, Any]:
    import msgspec

    return {
        "lake": location,
        "added": sum(each.added for each in counts.values()),
        "removed": sum(each.removed for each in counts.values()),
        "refused": sum(each.refused for each in counts.values()),
        "tables": msgspec.to_builtins(counts),
    }


def _text(location: str, counts: dict[str, Counts]) -> str:
    rows = [(name, each.added, each.removed, each.refused) for name, each in counts.items() if each.any]
    nothing = "nothing new"
    return f"{console.printable(location)}\n" + console.table(
        ["table", "rows added", "removed", "events refused"], rows, empty=nothing
    )


def _print_csv(answer: Answer) -> None:
    try:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
        sys.stdout.flush()
    except BrokenPipeError:
        raise console.ReaderGoneError from None

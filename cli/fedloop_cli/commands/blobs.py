"""`fedloop blobs`: the blob store of a deployment."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloop_cli import console, options

app = options.group(help="Clear the blob store.")


@app.command(cls=options.Command)
def sweep(
    where: options.DeploymentFolder,
    older_than_days: Annotated[
        float, typer.Option(min=1, max=36_500, help="Only what nobody has put into the store for so many days.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing: say what would be removed.")] = False,
    json: options.Json = False,
) -> None:
    """Remove the blobs that no event of the log names, once they are old.

    It reads the whole log first, and removes nothing if that cannot be read to its end. Other programs may go on meanwhile.
    A blob store that several deployments share must not be swept: each log knows its own blobs alone.
    """
    import msgspec
    from fedloop_server.operations import sweeping

    swept = sweeping.sweep(
        where.place,
        where.open_log(),
        where.open_blobs(),
        where.directory,
        older_than_s=older_than_days * sweeping.DAY_S,
        dry_run=dry_run,
    )
    what = "would be removed" if dry_run else "removed"
    text = (
        f"{swept.removed:,} of {swept.blobs:,} blobs {what}: {swept.freed_bytes:,} bytes"
        f" ({swept.named:,} are named by the log, {swept.young:,} are younger than {older_than_days:g} days)"
    )
    console.show(msgspec.to_builtins(swept), text, as_json=json)

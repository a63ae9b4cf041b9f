"""`fedloop doctor`: what keeps a deployment from working, or stands open, and what to do about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fedloop_cli import console, options


def doctor(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Folder of the deployment.", show_default=False)
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Folder of a device's store; its log and blobs are looked at.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Check this machine, and the deployment in FOLDER or at --log, or the one that a device's STORE belongs to.

    Looks at versions, disks, clocks, file modes, certificates, whether log and blobs answer, topics and rights. Changes nothing.
    Exit status 1 if anything fails.
    """
    from fedloop_cli.doctor import diagnosis

    log, blobs = options.given()
    found = list(diagnosis.diagnose(directory, log, blobs, store))
    count = Counter(each.level for each in found)
    document = {
        "findings": [{"subject": each.subject, "level": each.level, "what": each.what, "hint": each.hint} for each in found],
        "failed": count["fail"],
        "warned": count["warn"],
    }
    lines = []
    for each in found:
        lines.append(f"{each.level:4}  {each.subject:8}  {console.printable(each.what)}")
        lines += [f"{'':16}do: {console.printable(each.hint)}"] if each.hint else []
    console.show(document, "\n".join([*lines, "", f"{count['fail']} fail, {count['warn']} warn"]), as_json=json)
    if count["fail"]:
        raise typer.Exit(1)

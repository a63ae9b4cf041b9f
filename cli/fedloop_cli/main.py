"""The `fedloop` command: which commands there are, and how any of them ends.

Exit status: 0 done, 1 the check or the work failed, 2 the call was wrong, 3 something could not be reached, 4 a policy refused,
130 interrupted. What a command needs is imported when it runs, so that `fedloop --help` stays fast.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Final

import click
import typer
from fedloop_events.errors import FedloopError, UsageError
from fedloop_events.files import is_full, reason

from fedloop_cli import console, options, task_options
from fedloop_cli.commands import agent, audit, blobs, demo, doctor, feedback, gateway, init, log, model, release, rounds, server

INTERRUPTED: Final = 130
_LEFT: Final = ("fedloop-refresh", "fedloop-rounds", "fedloop-releases")
"""Threads that may be left in the middle of something: a device reads a log that may be away, trains, or hands a release over."""

app = options.group(help="Keep a language model learning from its users' feedback without their words leaving their devices.")
app.command(cls=task_options.MessagesCommand)(demo.demo)
app.command(cls=options.Command)(doctor.doctor)
app.add_typer(init.app, name="init")
app.add_typer(server.app, name="server")
app.add_typer(agent.app, name="agent")
app.add_typer(model.app, name="model")
app.add_typer(rounds.app, name="round")
app.add_typer(release.app, name="release")
app.add_typer(feedback.app, name="feedback")
app.add_typer(audit.app, name="audit")
app.add_typer(log.app, name="log")
app.add_typer(blobs.app, name="blobs")
app.command(cls=options.Command)(gateway.gateway)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedloop {version('fedloop')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and end the process with its exit status."""
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    if any(each.name in _LEFT for each in threading.enumerate()):
        # It may be in the middle of C++, which aborts the process where Python, on its way down, ends the thread under it.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """The exit status of `fedloop ARGUMENTS`."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.raiseExceptions = False
    # It warns of each recogniser for a language that is not configured.
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    try:
        status = app(arguments, prog_name="fedloop", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except FedloopError as error:
        return _fail(error, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        console.note(error.format_message())
        return UsageError.exit_status
    except click.ClickException as error:
        return _fail(_usage(error), arguments)
    except (KeyboardInterrupt, click.Abort):
        console.note("interrupted")
        return INTERRUPTED
    except (console.ReaderGoneError, BrokenPipeError):
        _discard_output()
        return 0
    except Exception as error:
        if os.environ.get("FEDLOOP_TRACEBACK"):
            raise
        if isinstance(error, OSError) and is_full(error):
            where = Path(error.filename or ".")
            return _fail(FedloopError(f"{where.parent} cannot be written: {reason(error, where)}"), arguments)
        return _fail(
            FedloopError(
                f"an internal error ({type(error).__name__})",
                cause=str(error) if isinstance(error, OSError) else "",
                hint="this is a defect: please report it with what FEDLOOP_TRACEBACK=1 shows",
            ),
            arguments,
        )


def _fail(error: FedloopError, arguments: list[str]) -> int:
    try:
        console.show_error(error, as_json="--json" in arguments)
    except BrokenPipeError:
        _discard_output()
    return error.exit_status


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "fedloop"
    message = error.format_message().strip()
    return UsageError(message[:1].lower() + message[1:], hint=f"{path} --help says what it takes")


def _discard_output() -> None:
    """Python flushes at the end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

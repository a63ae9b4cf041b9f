"""What all commands have in common: which deployment they are about, `--json`, `--config`, and how a command is registered."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import click
import typer
from fedloop_events.errors import UsageError
from msgspec import Struct
from typer.core import TyperCommand

if TYPE_CHECKING:
    from fedloop_events.blobs.store import BlobStore
    from fedloop_events.locations import DeploymentLocation
    from fedloop_events.logs.port import EventLog
    from fedloop_server.config import ServerConfig
    from fedloop_server.operations.followed import Followed

_LOG: Final = "fedloop.log"
_BLOBS: Final = "fedloop.blobs"


class Where(Struct, frozen=True):
    """The deployment that a command is about, and its folder, if one was named."""

    directory: Path | None
    place: DeploymentLocation

    def open_log(self) -> EventLog:
        """Raises as `fedloop_server.operations.opening.open_log`."""
        from fedloop_server.operations import opening

        return opening.open_log(self.place, self.directory)

    def open_blobs(self) -> BlobStore:
        """Raises as `fedloop_server.operations.opening.open_blobs`."""
        from fedloop_server.operations import opening

        return opening.open_blobs(self.place, self.directory)

    def follow(self) -> Followed:
        """Its rounds, releases and clients. Raises as `open_log`."""
        from fedloop_server.operations.followed import Followed

        return Followed(self.open_log())

    def config(self) -> ServerConfig | None:
        """The server's, where its folder is at hand. Raises `UsageError` for one that cannot be read."""
        from fedloop_server.deployment import read_config

        return read_config(self.directory)


class Released(Where, frozen=True):
    """The same, and one of its releases, if it was named."""

    release: str | None


class Home(Where, frozen=True):
    """The same, where the folder must be named: the server's key is in it."""

    directory: Path


def given() -> tuple[str | None, str | None]:
    """`--log` and `--blobs` of the command that runs; every command takes them."""
    found = click.get_current_context().meta
    return found.get(_LOG), found.get(_BLOBS)


def in_bytes(mb: int | None) -> int | None:
    return None if mb is None else mb * 10**6


def _where(value: Path | tuple[Path, ...] | None) -> Where:
    from fedloop_events import locations

    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if len(values) > 1:
        raise UsageError(f"got unexpected extra argument {str(values[1])!r}")
    (log, blobs), directory = given(), values[0] if values else None
    if directory is None and log is None:
        raise UsageError("missing argument 'DIR'", hint="name the deployment's folder, or its log with --log")
    if directory is not None and log is not None and not directory.is_dir():
        raise UsageError(f"there is no folder {directory}", hint="with --log, DIR can be left out")
    if directory is None and log is not None and not locations.is_url(log):
        directory = Path(log)
    return Where(directory, locations.locate(directory, log, blobs))


def _where_and_release(values: tuple[Path, ...]) -> Released:
    """DIR and RELEASE; one value alone is DIR, unless `--log` is given and there is no such folder."""
    directories, release = values, None
    if len(values) == 2 or (len(values) == 1 and given()[0] is not None and not values[0].is_dir()):
        directories, release = values[:-1], str(values[-1])
    where = _where(directories)
    return Released(where.directory, where.place, release)


def _home(directory: Path) -> Home:
    from fedloop_events import locations

    return Home(directory=directory, place=locations.locate(directory, *given()))


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
DeploymentFolder = Annotated[Where, typer.Argument(metavar="[DIR]", parser=Path, callback=_where)]
"""DIR can be left out where `--log` is given, also before another argument."""
DeploymentAndRelease = Annotated[Released, typer.Argument(metavar="[DIR] [RELEASE]", parser=Path, callback=_where_and_release)]
"""Before an argument that is required; either can be left out."""
ServerFolder = Annotated[Home, typer.Argument(metavar="DIR", parser=Path, callback=_home)]
BaseDtype = Annotated[
    Literal["auto", "f32", "bf16", "nf4"],
    typer.Option(help="What a language model's frozen base is held in; auto: bf16 for a large one where it is fast, else f32."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Train adapters of at most this rank.", show_default="as asked")]
UseCase = Annotated[str, typer.Option(metavar="NAME", help="What the application is for: its feedback is measured under it.")]
ScratchMb = Annotated[
    int | None,
    typer.Option(
        metavar="MB",
        min=0,
        help="Most that a language model puts beside the store, sealed, of what it has computed of texts while this runs.",
        show_default="2000, or a tenth of what is free",
    ),
]
StoreFolder = Annotated[Path, typer.Option(metavar="STORE", help="Folder of the device's own encrypted store.")]

_ARGUMENTS: Final = {
    "DIR": "Folder of the deployment.",
    "ROUND": "A round's id, such as r0001.",
    "REQUEST": "A request's id, which `round start` has printed.",
    "RELEASE": "A release's id.",
    "[DIR] [RELEASE]": "Folder of the deployment; a release's id.",
    "OUT": "Folder to make; it must be new or empty.",
    "CLIENT": "A client's id.",
    "MODEL": "The name of a model that was added.",
    "EVENT": "An event's id, as `feedback quarantine list` shows it.",
    "TRIGGER": "A trigger's name, as in server.toml: [trigger.NAME].",
    "GGUF_OR_FOLDER": "A GGUF file, the name of a package that carries one, or a folder with config.json and safetensors.",
    "SQL": "A query in DuckDB's SQL.",
    "FEEDBACK_ID": "The id that recording the feedback printed.",
}
"""What arguments mean, by metavar: Typer 0.20 loses their help under click 8.4 and later."""

_PLACES: Final = {
    _LOG: ("--log", "FEDLOOP_LOG", "The log: a folder, kafka://HOST:PORT/PREFIX or a gateway's https://HOST."),
    _BLOBS: ("--blobs", "FEDLOOP_BLOBS", "The blobs: a folder, s3://BUCKET/PREFIX or another fsspec URL."),
}


class Command(TyperCommand):
    """A command that takes `--log` and `--blobs`, and `--config FILE`: TOML whose tables are commands and whose keys are their
    options.

    An option on the command line outweighs its environment variable, which outweighs the file. A table or key that no command
    has is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments = [each for each in self.params if isinstance(each, click.Argument)]
        if arguments and (arguments[0].metavar or "").startswith("[DIR]"):
            arguments[0].required = False
            if all(each.required for each in arguments[1:]):
                arguments[0].nargs = -1  # none or one: click gives those after it their values first
        for name, (flag, variable, text) in _PLACES.items():
            self.params.append(
                click.Option(
                    [flag],
                    envvar=variable,
                    metavar="LOCATION",
                    help=f"{text} [{variable}]",
                    is_eager=True,
                    expose_value=False,
                    callback=partial(_keep, name),
                )
            )
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(dir_okay=False, path_type=Path),
                help="TOML file with defaults for options: [server.init] epsilon = 4",
                is_eager=True,
                expose_value=False,
                callback=_configure,
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        arguments, listed = [], []
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option):
                # click's own, for Typer's imports rich and escapes brackets for it.
                record = click.Option.get_help_record(parameter, ctx)
                listed += [record] if record is not None else []
            else:
                arguments.append((parameter.make_metavar(ctx), _meaning(parameter.metavar or "")))
        for title, records in (("Arguments", arguments), ("Options", listed)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _meaning(metavar: str) -> str:
    return _ARGUMENTS.get(metavar, "") or _ARGUMENTS.get(metavar.strip("[]"), "")


def group(name: str | None = None, help: str = "") -> typer.Typer:  # noqa: A002 (typer's word)
    """A group of commands."""
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        suggest_commands=False,  # click does
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def _keep(name: str, context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    context.meta[name] = value


def _configure(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML", cause=str(error)) from None
    defaults = _defaults(found, context.find_root().command, [], path)
    names = context.command_path.split()[1:]
    context.default_map = defaults.get(".".join(names), {})


def _defaults(found: dict[str, Any], command: click.Command, names: list[str], path: Path) -> dict[str, dict[str, Any]]:
    """Defaults by dotted command name, each key and value checked. Raises `UsageError` that names the key."""
    if isinstance(command, click.Group):
        tables: dict[str, dict[str, Any]] = {}
        for name, below in found.items():
            where = ".".join([*names, name])
            child = command.commands.get(name)
            if child is None or not isinstance(below, dict):
                raise _unknown(f"[{where}]", path, [".".join([*names, each]) for each in command.commands], where)
            tables |= _defaults(below, child, [*names, name], path)
        return tables
    options = {
        flag.removeprefix("--").removeprefix("no-"): parameter
        for parameter in command.get_params(click.Context(command))
        if isinstance(parameter, click.Option) and parameter.name not in {"config", "help"}
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    values: dict[str, Any] = {}
    for key, value in found.items():
        option = options.get(key)
        if option is None or option.name is None:
            raise _unknown(f'"{key}" in [{".".join(names)}]', path, list(options), key)
        try:
            values[option.name] = option.type_cast_value(click.Context(command), value)
        except click.BadParameter as error:
            raise UsageError(f"{path}: {key} = {value!r} in [{'.'.join(names)}] is not allowed", cause=error.message) from None
    return {".".join(names): values}


def _unknown(what: str, path: Path, known: list[str], given: str) -> UsageError:
    near = get_close_matches(given, known, 1)
    return UsageError(
        f"{path}: there is no {what}",
        hint=f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known)}",
    )

"""What the sources and the documents advise: every hint, and every command line, option, variable and setting in a text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from fedloop_cli.main import app
from fedloop_cli.task_options import TaskOption
from fedloop_tasks.table import DEFAULT
from typer.main import get_command

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("events", "privacy", "tasks", "clients", "server", "cli")
VALUE: Final = "VALUE"
"""In place of what a text has from elsewhere."""
ROOT_COMMAND: Final = get_command(app)
_COMMAND: Final = re.compile(r"(?<![\w./'\"@-])fedloop (?=[a-z])")
_END: Final = re.compile(r"`|&&|\||>|#|\n")
_PROSE_END: Final = re.compile(r"[`;,.:()\n]|&&|\||>|#| - ")


class Text(NamedTuple):
    """A text of the sources, with the place where it stands."""

    where: str
    text: str


class Mention(NamedTuple):
    """A command line in a text. `marked`: it is set apart as code, so all of it is meant."""

    line: str
    marked: bool


# --- the sources ------------------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def texts() -> Iterator[Text]:
    """Every text in the sources, help and documentation of functions included."""
    for where, tree in modules().items():
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            match node:
                case ast.JoinedStr() | ast.Constant(value=str()) if id(node) not in inside:
                    yield Text(f"{where}:{node.lineno}", _flat(node))


def hints() -> Iterator[Text]:
    """What each error, each finding of the doctor and each thing that is waited for advises."""
    for where, tree in modules().items():
        for node in ast.walk(tree):
            for advice in _advice(node):
                for text in _possible(advice, where):
                    if text:
                        yield Text(f"{where}:{advice.lineno}", text)


def documents() -> Iterator[Text]:
    """The code in the README and the documents, without comments."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        where = str(path.relative_to(ROOT))
        for block in re.findall(r"^```sh.*?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield from (Text(where, f"`{line.partition(' #')[0].strip()}`") for line in block.replace("\\\n", " ").splitlines())
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
            yield Text(where, f"`{span}`")


def _advice(node: ast.AST) -> Iterator[ast.expr]:
    match node:
        case ast.Call(func=ast.Name(id="Finding"), args=[_, _, _, advice]):
            yield advice
        case ast.Call(keywords=keywords):
            yield from (each.value for each in keywords if each.arg == "hint")
        case ast.Assign(targets=[ast.Name(id="hint") | ast.Attribute(attr="hint")], value=advice):
            yield advice
        case ast.FunctionDef(name=name) if name.endswith("hint"):
            yield from (each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value is not None)
        case ast.AnnAssign(target=ast.Name(id="_ADVICE"), value=ast.Dict(values=values)):
            yield from values


def _possible(node: ast.expr, where: str) -> list[str]:
    """The texts that an expression in a module can have."""
    match node:
        case ast.IfExp(body=one, orelse=other):
            return [*_possible(one, where), *_possible(other, where)]
        case ast.BoolOp(values=values):
            return [text for each in values for text in _possible(each, where)]
        case ast.Name(id=name):
            constants = _constants().get(name, {})
            return [_flat(constants[where])] if where in constants else list(map(_flat, constants.values()))
        case ast.Constant(value=str()) | ast.JoinedStr():
            return [_flat(node)]
        case _:
            return []


def _flat(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        match node.value:
            case ast.Name(id=name) if name.isupper() and name in _constants():
                return _flat(next(iter(_constants()[name].values())))
            case ast.Call(func=ast.Name(id="how_to_make") | ast.Attribute(attr="how_to_make")):
                return "`fedloop server init DIR --test CSV`"
            case _:
                return VALUE
    return "".join(map(_flat, node.values)) if isinstance(node, ast.JoinedStr) else VALUE


@cache
def _constants() -> dict[str, dict[str, ast.expr]]:
    """The constants of text, by name and module."""
    found: dict[str, dict[str, ast.expr]] = {}
    for where, tree in modules().items():
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(target=ast.Name(id=name), value=value):
                    if isinstance(value, ast.Constant | ast.JoinedStr):
                        found.setdefault(name, {})[where] = value
    return found


# --- command lines ----------------------------------------------------------------------------------------------------


def mentions(text: str) -> Iterator[Mention]:
    """The command lines of `fedloop` that a text names."""
    for found in _COMMAND.finditer(text):
        marked = text[: found.start()].count("`") % 2 == 1
        rest = text[found.start() :]
        end = (_END if marked else _PROSE_END).search(rest)
        yield Mention(rest[: end.start()].strip() if end else rest.strip(), marked)


def wrong_with(mention: Mention) -> str | None:
    """Why a command line cannot be run as it stands; None if it can. A mere name of a command is right where that exists."""
    words = mention.line.replace("…", "").split()[1:]
    command: click.Command = ROOT_COMMAND
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        if name == "--help":
            return None
        if name not in command.commands:
            return f"there is no command {name!r} in {mention.line!r}"
        command = command.commands[name]
    if not mention.marked or not words or isinstance(command, click.Group) or words == ["--help"]:
        return None
    try:
        given = shlex.split(" ".join(words))
    except ValueError as error:
        return f"{mention.line!r}: {error}"
    return _wrong_arguments(command, given, mention.line)


def _wrong_arguments(command: click.Command, words: list[str], line: str) -> str | None:
    context = click.Context(command)
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return f"{line!r}: {error.format_message()}"
    if rest:
        return f"{line!r}: too many arguments"
    for each in command.get_params(context):
        given = _given(values.get(each.name or ""))
        if each.metavar == "[DIR]" and each.nargs == -1 and given and len(values[each.name or ""]) > 1:
            return f"{line!r}: too many arguments"
        deployment = (each.metavar or "").startswith("[DIR]") and "--log" not in words
        needed = each.required or (isinstance(each, TaskOption) and each.required_by(values.get("task") or DEFAULT))
        if not given and (needed or deployment):
            return f"{line!r} lacks {each.opts[0]}"
        if given and isinstance(each.type, click.Choice) and values[each.name or ""] not in each.type.choices:
            return f"{line!r}: {each.opts[0]} is one of {', '.join(each.type.choices)}"
    return None


def _given(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, tuple | list) and len(value) > 0)


def commands(group: click.Command = ROOT_COMMAND) -> Iterator[click.Command]:
    """Every command."""
    if isinstance(group, click.Group):
        for below in group.commands.values():
            yield from commands(below)
    else:
        yield group


def parameters() -> Iterator[click.Parameter]:
    for command in commands():
        yield from command.get_params(click.Context(command))

"""What the command line takes for the tasks that exist: `--task`, and the options that each of them declares.

All tasks' options are known before a command knows its task, so that `--help` lists them and `--config` may set them; what
does not belong to the task is refused once that is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import click
from fedloop_events.errors import UsageError

from fedloop_cli.options import Command

if TYPE_CHECKING:
    from fedloop_tasks.task import Option, Task

_CHOSEN: Final = "fedloop.task"
_GIVEN: Final = "fedloop.task.options"


class TaskOption(click.Option):
    """An option of the tasks that declare one of its name."""

    def __init__(self, name: str, declared: Mapping[str, Option]) -> None:
        from fedloop_tasks.table import TASKS

        self.declared = declared
        """By the name of the task."""
        super().__init__(
            [f"--{name}"],
            metavar="|".join(dict.fromkeys(each.metavar for each in declared.values())),
            help=_help(declared, everywhere=len(declared) == len(TASKS)),
            expose_value=False,
            callback=_keep,
        )

    def required_by(self, task: str) -> bool:
        return task in self.declared and self.declared[task].required


class TaskCommand(Command):
    """A command that also takes what tasks declare; subclasses say which of it."""

    takes_task: ClassVar[bool] = True
    """Whether `--task` says which task it is about."""

    def declared(self, task: Task | type[Task]) -> Sequence[Option]:
        raise NotImplementedError

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*self._of_tasks, *super().get_params(ctx)]

    @cached_property
    def _of_tasks(self) -> list[click.Parameter]:
        from fedloop_tasks.table import DEFAULT, TASKS

        found: dict[str, dict[str, Option]] = {}
        for name, task in TASKS.items():
            for each in self.declared(task):
                found.setdefault(each.name, {})[name] = each
        choice = click.Option(
            ["--task"],
            metavar="NAME",
            default=DEFAULT,
            show_default=True,
            help=f"What the model learns: {' or '.join(TASKS)}.",
            expose_value=False,
            callback=_choose,
        )
        return [*([choice] if self.takes_task else []), *(TaskOption(name, declared) for name, declared in found.items())]


class FilesCommand(TaskCommand):
    """Takes the files that a model is made from."""

    def declared(self, task: Task | type[Task]) -> Sequence[Option]:
        return [*task.files, *task.columns]


class ShapeCommand(TaskCommand):
    """Takes what shapes a model whose files are known."""

    def declared(self, task: Task | type[Task]) -> Sequence[Option]:
        return shape(task)


class RemarksCommand(TaskCommand):
    """Takes what a user can say of a response in one task alone. The device knows its task."""

    takes_task = False

    def declared(self, task: Task | type[Task]) -> Sequence[Option]:
        return [*task.remarks, *task.columns]


class MessagesCommand(TaskCommand):
    """Takes files of messages."""

    def declared(self, task: Task | type[Task]) -> Sequence[Option]:
        return task.columns


def chosen() -> type[Task]:
    """The task that `--task` names. Raises `UsageError` if there is none of that name, and as `check`."""
    from fedloop_tasks.table import task_named

    task = task_named(click.get_current_context().meta[_CHOSEN])
    check(task)
    return task


def shape(task: Task | type[Task]) -> Sequence[Option]:
    """What a task takes of a model that is no file."""
    return [each for each in task.files if each.kind is not Path]


def check(task: Task | type[Task]) -> None:
    """Raises `UsageError` if an option of other tasks is given, or one that this task requires is not."""
    from fedloop_tasks.table import name_of

    context = click.get_current_context()
    assert isinstance(context.command, TaskCommand)
    own, found = {each.name: each for each in context.command.declared(task)}, given()
    for each in context.command.get_params(context):
        if isinstance(each, TaskOption) and (name := each.opts[0].removeprefix("--")) in found and name not in own:
            raise UsageError(
                f"--{name} is an option of the task {' and '.join(each.declared)}, and this deployment's task is {name_of(task)}",
                hint=f"{name_of(task)} takes {', '.join(f'--{each}' for each in own)}" if own else "",
            )
    for name, option in own.items():
        if option.required and name not in found:
            raise UsageError(f"the task {name_of(task)} needs --{name} {option.metavar}", hint=option.help)


def given() -> Mapping[str, str]:
    """The options of tasks that are given, as they were written, by name."""
    found: dict[str, str] = click.get_current_context().meta.get(_GIVEN, {})
    return found


def of_task(declared: Sequence[Option]) -> dict[str, Any]:
    """The values of these options, which the task declares, by name; None for one that is not given. Raises `UsageError` for one
    that is not of its kind."""
    found = given()
    return {each.name: _value(each, found[each.name]) if each.name in found else None for each in declared}


def check_columns(data: Path | None) -> None:
    """Raises `UsageError` if something says what the columns of a file of messages are called, and there is no `data`."""
    from fedloop_tasks.table import TASKS

    columns = {each.name for task in TASKS.values() for each in task.columns}
    if data is None and (idle := [name for name in given() if name in columns]):
        raise UsageError(f"--{idle[0]} is about a file of messages, and there is none", hint="give the file with --data")


def _help(declared: Mapping[str, Option], *, everywhere: bool) -> str:
    """One text where all tasks mean the same, else which of them mean what."""
    meant: dict[str, list[str]] = {}
    for task, each in declared.items():
        meant.setdefault(each.help + ("  [required]" if each.required else ""), []).append(task)
    if everywhere and len(meant) == 1:
        return next(iter(meant))
    return " ".join(f"For {' and '.join(tasks)}: {text}" for text, tasks in meant.items())


def _value(option: Option, written: str) -> Any:
    try:
        return option.kind(written)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(option.kind, option.metavar)
        raise UsageError(f"--{option.name} {written!r} is not {kind}", hint=option.help) from None


def _choose(context: click.Context, parameter: click.Parameter, value: str) -> None:
    context.meta[_CHOSEN] = value


def _keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.meta.setdefault(_GIVEN, {})[parameter.opts[0].removeprefix("--")] = value

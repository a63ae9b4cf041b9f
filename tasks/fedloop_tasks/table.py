"""The tasks and the programs that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from fedloop_events.errors import FedloopError, UsageError
from fedloop_events.types import Spec

from fedloop_tasks.causal.task import Chat
from fedloop_tasks.classification.task import Classification
from fedloop_tasks.programs.adapter import AdapterTraining
from fedloop_tasks.programs.class_sums import ClassSums
from fedloop_tasks.programs.exact import ExactTraining
from fedloop_tasks.programs.optimisers import OPTIMISERS
from fedloop_tasks.programs.svd import SvdTraining
from fedloop_tasks.task import Program, Task

TASKS: Final[Mapping[str, type[Task]]] = {"classification": Classification, "chat": Chat}
"""By the tag of their specs."""
DEFAULT: Final = "classification"
"""What a deployment is made for, unless its operator names another task."""
_PROGRAMS: Final[Sequence[Program]] = (
    ClassSums(),
    AdapterTraining("ffa", freezes_a=True),
    AdapterTraining("fedavg", freezes_a=False),
    SvdTraining("svd"),
    ExactTraining("stack", begins_anew=True),
    ExactTraining("residual", begins_anew=False),
    *OPTIMISERS.values(),
)
PROGRAMS: Final[Mapping[str, Program]] = {each.name: each for each in _PROGRAMS}
"""By the name that stands in `RoundOpened.strategy`."""


class UnknownProgramError(FedloopError):
    """A round runs a program that this version does not have."""


def task_of(spec: Spec) -> Task:
    """The task of a model."""
    return TASKS[str(spec.__struct_config__.tag)](spec)


def task_named(name: str) -> type[Task]:
    """The task of that name. Raises `UsageError`."""
    if (task := TASKS.get(name)) is None:
        near = get_close_matches(name, TASKS, 1)
        meant = f'; did you mean "{near[0]}"?' if near else ""
        raise UsageError(f'there is no task "{name}"{meant}', hint=f"choose one of {', '.join(TASKS)}")
    return task


def name_of(task: Task | type[Task]) -> str:
    """What a task is called in the table."""
    kind = task if isinstance(task, type) else type(task)
    return next(name for name, each in TASKS.items() if each is kind)


def program_of(strategy: str) -> Program:
    """The program of a round. Raises `UnknownProgramError`."""
    if (program := PROGRAMS.get(strategy)) is None:
        raise UnknownProgramError(
            f"no program is called {strategy}",
            hint=f"there are {', '.join(PROGRAMS)}: is this an older version than the server's?",
        )
    return program


def kind_of(strategy: str) -> str | None:
    """What a list of rounds shows as the kind of a round; None for a program that this version does not have."""
    return None if (program := PROGRAMS.get(strategy)) is None else program.kind

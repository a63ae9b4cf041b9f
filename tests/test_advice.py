"""Whatever a message, a hint, a help text or a document tells somebody to run or to set exists, and is written as it is used."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import advice
import pytest
from fedloop_clients.agent import Agent
from fedloop_clients.device import Settings
from fedloop_privacy.masking import Masker
from fedloop_server import config
from fedloop_tasks.table import TASKS

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"--upgrade"}
"""Options of other programs."""
FOREIGN = {"requires_grad_", "to_standard_module"}
"""Names of other libraries."""
MADE_HERE = {"response_id", "feedback_id"}
"""What the device's own calls give and take."""


def test_every_hint_is_found() -> None:
    found = list(advice.hints())
    assert len(found) > 200
    assert {each.where.partition("/")[0] for each in found} == set(advice.PACKAGES)
    assert any("fedloop server run DIR --accept-loss" in each.text for each in found)
    assert any("fedloop agent enrol`)" in each.text and each.where.startswith("clients/") for each in found)


@pytest.mark.parametrize("where", ["hints", "texts", "documents"])
def test_every_command_that_is_named_exists_and_can_be_run_as_it_is_written(where: str) -> None:
    """A command line with any argument has all that it needs; a name alone stands for the command."""
    found = [(each, mention) for each in getattr(advice, where)() for mention in advice.mentions(each.text)]
    assert len(found) > 10
    assert not [f"{each.where}: {wrong}" for each, mention in found if (wrong := advice.wrong_with(mention))]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("`fedloop log verify`", None),
        ("fedloop doctor says what is wrong", None),
        ("`fedloop log check`", "there is no command 'check'"),
        ("run fedloop verify first", "there is no command 'verify'"),
        ("`fedloop server run DIR --accept-losses`", "No such option"),
        ("`fedloop server init DIR`", "lacks --test"),
        ("`fedloop agent enrol --store STORE`", "lacks"),
        ("`fedloop agent enrol DIR --store STORE --key-from disk`", "is one of"),
        ("`fedloop log tail a b c`", "too many arguments"),
    ],
)
def test_a_command_that_does_not_exist_or_is_not_whole_is_noticed(line: str, wrong: str | None) -> None:
    (mention,) = advice.mentions(line)
    found = advice.wrong_with(mention)
    assert found is None if wrong is None else found is not None and wrong in found


def test_every_option_that_a_hint_names_exists() -> None:
    known = {name for each in advice.parameters() for name in (*each.opts, *each.secondary_opts)} | {"--help"} | ELSEWHERE
    named = {(each.where, name) for each in advice.hints() for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", each.text)}
    assert len(named) > 10
    assert not [f"{where}: {name}" for where, name in sorted(named) if name not in known]


def test_every_variable_that_a_text_names_is_read() -> None:
    read = {each.envvar for each in advice.parameters()}
    read |= set(re.findall(r"\$\{(FEDLOOP_[A-Z_]+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    benchmarks = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    for tree in (*advice.modules().values(), *benchmarks):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get"]
        read |= {str(ast.literal_eval(each.args[0])) for each in calls}
    named = {
        (each.where, name)
        for source in (advice.texts, advice.documents)
        for each in source()
        for name in re.findall(r"\bFEDLOOP_[A-Z_]+\b", each.text)
        if "TEST" not in name
    }
    assert named
    assert not [f"{where}: {name}" for where, name in sorted(named) if name not in read]


def test_every_target_of_make_that_a_text_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = [each for source in (advice.texts, advice.documents) for each in source()]
    named = {(each.where, name) for each in found for name in re.findall(r"`make ([a-z-]+)", each.text)}
    assert len(named) > 3
    assert not [f"{where}: make {name}" for where, name in sorted(named) if name not in targets]


def test_every_setting_and_argument_that_a_hint_names_exists() -> None:
    known = {*(key for task in TASKS.values() for key in config.meaning(task.plan)), *FOREIGN, *MADE_HERE}
    known |= {name for call in (Agent.enrol, Agent.open, Agent.feedback, Masker) for name in inspect.signature(call).parameters}
    known |= {*inspect.signature(Settings).parameters}
    named = {
        (each.where, name)
        for each in advice.hints()
        for name in re.findall(r"(?<![\w.'{])[a-z]+(?:_[a-z]+)+\b(?!\.|://)", each.text)
        if not name.startswith("fedloop_")
    }
    named |= {(each.where, name) for each in advice.hints() for name in re.findall(r"\bAgent\((\w+)=", each.text)}
    assert len(named) > 3
    assert not [f"{where}: {name}" for where, name in sorted(named) if name not in known]


def test_every_extra_and_module_that_a_hint_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = list(advice.hints())
    named = {(each.where, name) for each in found for name in re.findall(r"fedloop\[(\w+)\]", each.text) if name != advice.VALUE}
    assert not [f"{where}: {name}" for where, name in named if name not in extras]
    modules = {(each.where, name) for each in found for name in re.findall(r"\bfedloop_\w+(?:\.\w+)*", each.text)}
    assert not [f"{where}: {name}" for where, name in modules if find_spec(name) is None]

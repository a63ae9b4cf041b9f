"""What docs/lake.md shows runs as it stands there, and its table of columns is that of the lake."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import lake_logs
import pytest
from fedloop_cli import main
from fedloop_server.feedback.lake.catalog import EVERY

DOCUMENT = (Path(__file__).parent.parent / "docs" / "lake.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```([\w -]+)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the deployment `bank` is, with its lake."""
    made = tmp_path_factory.mktemp("lake")
    lake_logs.make(made / "bank", lake_logs.history(30)).close()
    here = Path.cwd()
    os.chdir(made)
    try:
        for line in BLOCKS["sh commands"].splitlines():
            assert main.run(shlex.split(line)[1:]) == 0, line
    finally:
        os.chdir(here)
    return made


@pytest.fixture
def shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The variables that each block of Python leaves."""
    monkeypatch.chdir(folder)
    found: dict[str, dict[str, Any]] = {}
    for info, code in BLOCKS.items():
        if info.startswith("python "):
            variables: dict[str, Any] = {}
            found[info.removeprefix("python ")] = variables
            exec(compile(code, info, "exec"), variables)
    return found


def test_every_example_runs_and_finds_something(folder: Path, shown: dict[str, dict[str, Any]]) -> None:
    rows = lake_logs.rows(folder / "bank" / "lake")
    assert sum(row[3] for row in shown["duckdb"]["worst"]) == len(rows["feedback"])
    assert len(shown["duckdb"]["drifted"]) == 1
    support = [row for row in rows["feedback"] if row[1] == "support"]
    assert shown["polars"]["by_day"]["n"].sum() == len(support)


def test_the_join_at_a_point_in_time_gives_what_was_known_before_each_feedback(
    folder: Path, shown: dict[str, dict[str, Any]]
) -> None:
    feedback = lake_logs.rows(folder / "bank" / "lake")["feedback"]
    expected = {
        row[0]: sum(
            (other[1], other[3]) == (row[1], row[3]) and other[8].replace(minute=0, second=0) < row[8].replace(minute=0, second=0)
            for other in feedback
        )
        for row in feedback
    }
    assert {event_id: before or 0 for event_id, _, before, *_ in shown["features"]["known_then"]} == expected
    in_polars = shown["features-polars"]["known_then"]
    assert dict(zip(in_polars["event_id"], in_polars["given_before"].fill_null(0), strict=True)) == expected


def test_the_document_names_every_column_of_every_table() -> None:
    told = {}
    for name, columns in re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", DOCUMENT, re.MULTILINE):
        told[name] = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", columns))
    assert told == {each.name: list(each.columns) for each in EVERY}

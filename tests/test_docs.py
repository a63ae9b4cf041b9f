"""What the README and the documents name exists, and the figures that the README quotes are those that were measured."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("events", "privacy", "tasks", "clients", "server", "cli", "tests", "benchmarks", "docs", "deploy")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(ROOMS)})/[\w./-]*")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADLINE_ROWS = 7
DOCUMENTS = sorted(
    each.relative_to(ROOT) for each in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.svg"))
)


def read(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    named = {found.rstrip("./-") for found in PATH.findall(read(document))}
    assert not [path for path in sorted(named) if not (ROOT / path).exists() and not made_by_running(path)]


def made_by_running(path: str) -> bool:
    """Whether git ignores it, as a folder: the data of a broker for development is one."""
    return subprocess.run(["git", "check-ignore", "--quiet", f"{path}/"], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_of_a_document_leads_to_a_file_and_to_a_heading_in_it(document: Path) -> None:
    missing = []
    for target, heading in LINK.findall(read(document)):
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists() or (heading and heading not in slugs(path)):
            missing.append(f"{target}#{heading}")
    assert not missing


def slugs(document: Path) -> set[str]:
    """The names by which links reach the document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_the_loops_in_three_hops() -> None:
    """The server's command, loop and fold; the device's loop, handler and programs; in this order."""
    ways = (
        (
            "cli/fedloop_cli/commands/server.py",
            "server/fedloop_server/rounds/loop.py",
            "events/fedloop_events/folds/rounds.py",
        ),
        (
            "clients/fedloop_clients/loop.py",
            "clients/fedloop_clients/instructions.py",
            "tasks/fedloop_tasks/programs/",
        ),
    )
    text = read(Path("README.md"))
    for way in ways:
        places = [text.find(f"`{path}`") for path in way]
        assert -1 not in places
        assert places == sorted(places)


def rows(document: Path) -> Iterator[dict[str, str]]:
    """The rows of the document's tables of measurements, by column."""
    columns: list[str] = []
    for line in read(document).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        elif "worst" in columns and set("".join(cells)) != {"-"}:
            yield dict(zip(columns, cells, strict=True))


def test_the_readmes_figures_are_rows_of_what_was_measured() -> None:
    measured = list(rows(Path("docs/benchmarks.md")))
    headlines = list(rows(Path("README.md")))
    assert len(headlines) == HEADLINE_ROWS
    for headline in headlines:
        assert any(headline.items() <= row.items() for row in measured), headline


def test_a_measured_row_says_how_many_runs_and_whether_its_worst_kept_the_promise() -> None:
    measured = list(rows(Path("docs/benchmarks.md")))
    assert len(measured) > HEADLINE_ROWS
    for row in measured:
        assert row["runs"] == "counted" or int(row["runs"]) >= 3, row
        worst, promised = (float(row[name].replace(",", "") or "0") for name in ("worst", "promised"))
        assert row["kept"] == ("" if not row["promised"] else "yes" if worst >= promised else "NO"), row

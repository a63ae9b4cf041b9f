"""One gateway for the tests that only ask, another one for each that changes something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway.harness import Served, serving


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same, for tests after which it is as it was."""
    with serving(tmp_path_factory.mktemp("shared"), "device-1", "device-2") as served:
        yield served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A gateway with device-1 and device-2 enrolled."""
    with serving(tmp_path, "device-1", "device-2") as served:
        yield served

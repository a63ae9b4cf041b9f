"""One masker for all tests: it takes a while to build and holds no state."""

from __future__ import annotations

import pytest
from fedloop_privacy.masking import Masker


@pytest.fixture(scope="session")
def masker() -> Masker:
    return Masker()

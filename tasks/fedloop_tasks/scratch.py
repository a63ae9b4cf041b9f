"""Where a model may put what it computed and does not need to have. Nothing here imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from msgspec import Struct

MOST_BYTES: Final = 2_000_000_000


class Scratch(Struct, frozen=True):
    """A folder on a disk, and how much of it one model may take while the process runs: `MOST_BYTES`, or a tenth of what is free
    if that is less, where nothing is said; 0 for nothing."""

    folder: Path
    most_bytes: int | None = None

    def bound(self) -> int:
        """As of now. Raises OSError for a folder that cannot be asked."""
        return min(MOST_BYTES, shutil.disk_usage(self.folder).free // 10) if self.most_bytes is None else self.most_bytes

"""Whether a planted personal value stands anywhere it must not: every byte of every file of the deployment is searched, and every
event and every blob, wherever they are.

In text (the log, its write-ahead file, whatever was printed, the server's files) every value of four bytes or more is looked for,
and each word of a person's name by itself. In binary files (blobs, the devices' encrypted stores) values of eight bytes or more,
for shorter ones stand there by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from fedloop_events import locations
from fedloop_events.blobs.store import BlobStore
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import BlobRef

SHORTEST: Final = 4
SHORTEST_IN_BINARY: Final = 8
_BLOCK: Final = 32 << 20
_OVERLAP: Final = 1024
_HASH_BITS: Final = 20

Value = tuple[str, str]
"""Type and value."""


class Needles:
    """Values to look for, found through a hash of their first four bytes."""

    def __init__(self, planted: Iterable[Value], ordinary: Iterable[str]) -> None:
        """`ordinary` are words that stand in the messages anyway: a name that is also one of them is not looked for."""
        plain = set(ordinary)
        self.values: set[Value] = set()
        """What is looked for: each word of a person's name is a value by itself."""
        for kind, value in planted:
            words = value.split() if kind == "PERSON" else []
            self.values.update((kind, each) for each in (value, *words) if each.lower() not in plain)
        self._by_key: dict[int, list[tuple[bytes, Value]]] = defaultdict(list)
        self._hashes = np.zeros(1 << _HASH_BITS, dtype=bool)
        for kind, value in sorted(self.values):
            data = value.encode()
            if len(data) >= SHORTEST:
                key = int.from_bytes(data[:SHORTEST], "little")
                self._by_key[key].append((data, (kind, value)))
                self._hashes[_hash(np.array([key], dtype="<u4"))] = True

    def found_in(self, data: bytes, *, binary: bool) -> set[Value]:
        """The values that stand in `data`; those shorter than eight bytes as whole words, and in text alone."""
        found: set[Value] = set()
        for shift in range(SHORTEST):
            count = (len(data) - shift) // SHORTEST
            if count <= 0:
                break
            keys = np.frombuffer(data, "<u4", count, shift)
            for index in np.flatnonzero(self._hashes[_hash(keys)]).tolist():
                at = shift + SHORTEST * index
                for needle, value in self._by_key.get(int(keys[index]), ()):
                    if value not in found and data.startswith(needle, at) and _counts(data, at, needle, binary):
                        found.add(value)
        return found


def search(directory: Path, log: EventLog, blobs: BlobStore, needles: Needles) -> dict[Value, str]:
    """The planted values that stand in any file below `directory`, in any blob or any event, and in which one first."""
    found: dict[Value, str] = {}
    inside = _below(directory, blobs)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        parts = path.relative_to(directory).parts
        binary = (inside is not None and path.is_relative_to(inside)) or path.name.startswith("store.db")
        for block in _blocks(path):
            for value in needles.found_in(block, binary=binary):
                found.setdefault(value, "/".join(parts))
    for name in blobs.all() if inside is None else ():
        for value in needles.found_in(blobs.get(BlobRef(name, blobs.size_bytes(name) or 0)), binary=True):
            found.setdefault(value, f"blob {name}")
    for record in read_all(log):
        # Event by event, for a long one lies in pieces in a file, and elsewhere there is none.
        attributes = "\n".join([record.key, record.id, record.source, record.type, record.signature])
        for value in needles.found_in(b"%b\n%b" % (attributes.encode(errors="replace"), record.data), binary=False):
            found.setdefault(value, f"event {record.id}")
    return found


def _below(directory: Path, blobs: BlobStore) -> Path | None:
    """The folder of the blobs, if it is below `directory`."""
    folder = None if locations.is_url(blobs.url) else Path(blobs.url)
    return folder if folder is not None and folder.is_relative_to(directory) else None


def by_type(values: Iterable[Value]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind, _ in sorted(values):
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _counts(data: bytes, at: int, needle: bytes, binary: bool) -> bool:
    if len(needle) >= SHORTEST_IN_BINARY:
        return True
    return not binary and not _letter(data[at - 1 : at]) and not _letter(data[at + len(needle) : at + len(needle) + 1])


def _hash(keys: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Multiplicative hashing (Knuth, TAOCP 3, section 6.4)."""
    return keys * np.uint32(2_654_435_761) >> np.uint32(32 - _HASH_BITS)


def _letter(byte: bytes) -> bool:
    return byte.isalnum() or byte >= b"\x80"


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks that overlap, so that no value is cut in two."""
    with path.open("rb") as file:
        kept = b""
        while block := file.read(_BLOCK):
            yield kept + block
            kept = block[-_OVERLAP:]

"""What a frozen part gives of texts, beyond what memory holds: on disk, sealed, and gone with the process.

The file has no name, so that it ends with the process however that ends, and its key is in memory alone: what a disk still has
of it afterwards nobody can read.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Final, NamedTuple

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fedloop_events.files import reason
from torch import Tensor

from fedloop_tasks.scratch import Scratch

_TAG_BYTES: Final = 16
_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    at: int
    size: int
    nonce: bytes
    dtype: torch.dtype
    shape: torch.Size


class DiskStates:
    """The states of some texts; the oldest give way to new ones, so that the file never is larger than the scratch's bound.

    A text is known by a digest of it and of `base`, which says whose states they are; an entry that is not the one that was
    written is forgotten, and the states are computed again. A disk that fails, or is full, is left alone from then on; one
    warning says so.
    """

    def __init__(self, scratch: Scratch, base: bytes) -> None:
        self._scratch, self._base = scratch, base
        self._places: OrderedDict[bytes, _Place] = OrderedDict()
        self._cipher = AESGCM(secrets.token_bytes(32))
        self._at = self._written = 0
        self._most: int | None = None
        """None before the first entry, 0 where there is to be none."""
        self._file: Any = None

    def get(self, text: Hashable) -> Tensor | None:
        key = self._digest(text)
        if (place := self._places.get(key)) is None:
            return None
        try:
            self._file.seek(place.at)
            data = self._cipher.decrypt(place.nonce, self._file.read(place.size), key)
        except (InvalidTag, ValueError):  # it is damaged, or shorter than a seal
            del self._places[key]
            return None
        except OSError as error:
            self._give_up(error)
            return None
        return torch.frombuffer(bytearray(data), dtype=place.dtype).reshape(place.shape)

    def put(self, text: Hashable, states: Tensor) -> None:
        """Keeps the states of a text, unless it has some here, or there is no room for them."""
        key = self._digest(text)
        if key in self._places or self._most == 0:
            return
        size = states.nbytes + _TAG_BYTES
        try:
            if self._file is None:
                self._open()
            if size > (self._most or 0):
                return
            place = _Place(self._room(size), size, self._nonce(), states.dtype, states.shape)
            data = states.contiguous().flatten().view(torch.uint8).numpy().data
            self._file.seek(place.at)
            if self._file.write(self._cipher.encrypt(place.nonce, data, key)) < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)
            return
        self._places[key] = place
        self._at = place.at + size

    def _open(self) -> None:
        """A file that only its owner can read, and nobody by a name."""
        self._most = self._scratch.bound()
        if self._most:
            self._file = tempfile.TemporaryFile(dir=self._scratch.folder, buffering=0)  # noqa: SIM115  # it lasts as this does
            weakref.finalize(self, self._file.close)

    def _room(self, size: int) -> int:
        """Where so many bytes go next; whose places they take is forgotten."""
        at = self._at
        if at + size > (self._most or 0):
            while self._places and next(iter(self._places.values())).at >= at:
                self._places.popitem(last=False)
            at = 0
        while self._places and at <= next(iter(self._places.values())).at < at + size:
            self._places.popitem(last=False)
        return at

    def _nonce(self) -> bytes:
        self._written += 1
        return self._written.to_bytes(12, "big")

    def _digest(self, text: Hashable) -> bytes:
        return hashlib.sha256(self._base + repr(text).encode()).digest()

    def _give_up(self, error: OSError) -> None:
        folder = self._scratch.folder
        _log.warning("nothing more of texts is kept in %s (%s): it is computed again", folder, reason(error, folder))
        self._most = 0
        self._places.clear()
        if self._file is not None:
            self._file.close()

"""The personal layer in a device's store: one at a time, bound to the model and to the factors that it was trained with.

It is kept beside the release and read by nothing but answering: rounds, exports and the log know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_events.types import Spec
from fedloop_tasks.personal import Trained, added
from msgspec import Struct

from fedloop_clients.store import Store

_ABOUT: Final = "personal"
_CHANGE: Final = "personal-change"


class Personal(Struct, frozen=True):
    """A personal layer: the release that it was trained on top of, with how many of the person's examples, and the mean loss of
    those that were held out before and after.

    It `acts` as long as the release in force has the factors that it was trained with; else it rests until it is trained anew.
    """

    release: str
    examples: int
    held_out: int
    loss_before: float
    loss_after: float
    acts: bool = True

    @property
    def sentence(self) -> str:
        rests = (
            ""
            if self.acts
            else "; it rests, for the release in force has other factors: `fedloop agent personalise` trains it anew"
        )
        return (
            f"of {self.examples} examples, on release {self.release}, loss {self.loss_before:.3f} to {self.loss_after:.3f} on "
            f"{self.held_out} others{rests}"
        )


class Personalised(Struct, frozen=True):
    """What training a personal layer came to: it is kept only if it makes the loss on examples that it has not seen less."""

    kept: bool
    layer: Personal


class _Kept(Struct, frozen=True):
    layer: Personal
    spec: str
    factors: str
    change: str
    """SHA-256 of the model's spec, of the release's factors that stay as they are, and of the layer's own tensors."""
    through: int
    """The number of the newest feedback that there was: what came before may have been trained on."""


class Layer(Struct, frozen=True):
    """A layer to put on top of a release."""

    sha256: str
    factors: str
    change: Mapping[str, Array]

    def on(self, release: Mapping[str, Array]) -> Mapping[str, Array]:
        """The release with the layer on top; as it is, if it has other factors."""
        return added(release, self.change) if _factors(release) == self.factors else release


class PersonalLayers:
    """The personal layer in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._acts: tuple[tuple[str, str], bool] = ("", ""), False

    def sha256(self, spec: Spec) -> str:
        """Of the layer for this model; "" without one."""
        kept = self._kept()
        return kept.change if kept is not None and kept.spec == _digest(spec) else ""

    def layer(self, sha256: str) -> Layer | None:
        """The layer of these bytes; None if another one has taken its place, or it was forgotten."""
        kept, data = self._kept(), self._store.kept(_CHANGE)
        if kept is None or data is None or not sha256 == kept.change == hashlib.sha256(data).hexdigest():
            return None
        return Layer(sha256, kept.factors, tensors.decode(data))

    def current(self, spec: Spec | None, release: Callable[[], Mapping[str, Array]] | None, blob: str) -> Personal | None:
        """The layer there is; whether it acts on the release whose tensors, with the SHA-256 `blob`, these are. Raises
        `BlobError` if they are another's by now."""
        if (kept := self._kept()) is None:
            return None
        if self._acts[0] != (kept.change, blob):
            acts = spec is not None and release is not None and kept.spec == _digest(spec) and kept.factors == _factors(release())
            self._acts = (kept.change, blob), acts
        return msgspec.structs.replace(kept.layer, acts=self._acts[1])

    def retracted(self) -> int:
        """How much feedback was taken back so far: see `keep`."""
        return int(self._store.rows("SELECT count(*) FROM retracted")[0][0])

    def keep(self, spec: Spec, release: str, arrays: Mapping[str, Array], found: Trained, retracted: int) -> Personalised:
        """Keep a layer in place of an earlier one; where it is no better than the release alone, there is none from now on.

        Raises `UsageError` if feedback was taken back since there were so many `retracted`: it may have been trained on.
        """
        layer = Personal(release, found.examples, found.held_out, found.loss_before, found.loss_after)
        data = b"".join(map(bytes, tensors.encode(found.change)))
        with self._store.transaction() as db:
            if self.retracted() != retracted:
                raise UsageError("feedback was taken back while the personal layer was trained on it", hint="train it again")
            _forget(db)
            if found.change:
                through = db.execute("SELECT coalesce(max(number), 0) FROM feedback").fetchone()[0]
                kept = _Kept(layer, _digest(spec), _factors(arrays), hashlib.sha256(data).hexdigest(), through)
                self._store.keep(_CHANGE, data)
                self._store.keep(_ABOUT, msgspec.json.encode(kept))
        return Personalised(bool(found.change), layer)

    def forget(self) -> bool:
        """Delete the layer; whether there was one."""
        with self._store.transaction() as db:
            return _forget(db)

    def _kept(self) -> _Kept | None:
        found = self._store.kept(_ABOUT)
        return None if found is None else msgspec.json.decode(found, type=_Kept)


def forget_seen(db: Any, number: int) -> None:
    """Delete the layer if it may have been trained on the feedback of this number, which is taken back."""
    found = db.execute("SELECT value FROM kept WHERE name = ?", (_ABOUT,)).fetchone()
    if found is not None and number <= msgspec.json.decode(bytes(found[0]), type=_Kept).through:
        _forget(db)


def _forget(db: Any) -> bool:
    return bool(db.execute("DELETE FROM kept WHERE name IN (?, ?)", (_ABOUT, _CHANGE)).rowcount)


def _digest(spec: Spec) -> str:
    return hashlib.sha256(msgspec.json.encode(spec)).hexdigest()


def _factors(release: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for chunk in tensors.encode({name: values for name, values in release.items() if name.endswith(".A")}):
        digest.update(chunk)
    return digest.hexdigest()

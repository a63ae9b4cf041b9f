"""How a device becomes a client of a deployment: its identity, its key, its budget."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from fedloop_events import types
from fedloop_events.blobs.store import BlobStore, Identifiable
from fedloop_events.errors import NotAllowedError, UsageError
from fedloop_events.files import quoted, reason
from fedloop_events.folds.identities import Client, Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.locations import DeploymentLocation, check_log, how_to_make, is_url, locate
from fedloop_events.logs.port import EventLog
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter
from msgspec import Struct

from fedloop_clients import keys
from fedloop_clients.keys import KeySource
from fedloop_clients.outbox import Outbox
from fedloop_clients.store import FILE_NAME, Store
from fedloop_clients.store_file import StoreError

_IDENTITY: Final = "identity"
P = TypeVar("P", bound=EventLog | BlobStore)


class Identity(Struct, frozen=True, forbid_unknown_fields=True):
    """Who the device is, which server it believes, and the privacy budget of its whole life.

    `location` is the log's, `blobs` where the blobs are, if the log does not name the place. `epsilon` None means that its owner
    allows rounds without differential privacy. `signing_key` is secret (32 bytes).
    """

    client_id: str
    node_id: int
    origin: str
    location: str
    server_key: str
    signing_key: bytes
    epsilon: float | None
    delta: float
    blobs: str | None = None

    @property
    def place(self) -> DeploymentLocation:
        """Where the deployment is."""
        return locate(None, self.location, self.blobs)

    @property
    def key(self) -> SigningKey:
        return SigningKey.from_private_bytes(self.signing_key)

    def derived_id(self, kind: str, given: str) -> str:
        """An id that is a function of this device and of `given`; without the device's key it tells nothing of it."""
        data = msgspec.json.encode((kind, given))
        return hashlib.blake2b(data, digest_size=16, key=self.signing_key, person=b"fedloop.id").hexdigest()

    def secret(self, purpose: str) -> bytes:
        """A key of 32 bytes for one purpose (of up to 8 letters), derived from the device's own, of which it tells nothing."""
        return hashlib.blake2b(digest_size=32, key=self.signing_key, person=b"fedloop." + purpose.encode()).digest()

    def writer(self, log: EventLog) -> EventWriter:
        """Who signs the events of this device."""
        return EventWriter(log, self.key)

    def introduced(self, place: P) -> P:
        """A place to which this is the device that asks, if it authenticates who reads and writes: a gateway."""
        if isinstance(place, Identifiable):
            place.identify(self.client_id, self.key)
        return place


def kept(location: str | Path, check: Callable[[str], str] = check_log) -> str:
    """A location as a device keeps it: it must mean the same from any folder."""
    text = str(location)
    return check(text) if is_url(text) else str(Path(text).absolute())


def enrol(
    log: EventLog,
    folder: Path,
    *,
    location: str,
    blobs: str | None,
    client_id: str | None,
    epsilon: float | None,
    delta: float,
    key_from: KeySource,
) -> tuple[Store, Identity]:
    """A device with a new store in `folder`, whose `ClientEnrolled` the log holds when this returns.

    Interrupted, it can be called again with the same arguments and ends what it began. Raises `UsageError` if the name is taken
    or malformed, the budget makes no sense, or the folder holds another device.
    """
    _check_terms(client_id, epsilon, delta)
    reader = Reader(log, Identities())
    reader.catch_up()
    known = reader.fold
    if not known.origin:
        raise UsageError(
            f"the log at {location} belongs to no deployment", hint=f"an operator makes one with {how_to_make(location)}"
        )
    if client_id in known.clients and not (folder / FILE_NAME).exists():
        raise UsageError(
            f"a device named {client_id} is enrolled already",
            hint="choose another client_id (--client-id), or the store that it has",
        )
    store = Store.create(_private(folder) / FILE_NAME, keys.create(folder, key_from, needed=_holds(folder / FILE_NAME)))
    try:
        stored = store.kept(_IDENTITY)
        if stored is None:
            identity = Identity(
                client_id=client_id or f"device-{secrets.token_hex(6)}",
                node_id=secrets.randbits(63) | 1,
                origin=known.origin,
                location=location,
                blobs=blobs,
                server_key=known.server_key,
                signing_key=SigningKey.generate().private_bytes(),
                epsilon=epsilon,
                delta=delta,
            )
            _write(store, identity, log)
        else:
            identity = msgspec.msgpack.decode(stored, type=Identity)
            _check_same(identity, known, client_id, epsilon, delta)
        identity.introduced(log)
        writer = identity.writer(log)
        enrolled = _enrolled(store, writer, reader, identity.client_id)
        if enrolled is None or enrolled.public_key != writer.key.public_key:
            raise UsageError(
                f"another device is enrolled as {identity.client_id}",
                hint="enrol under another client_id (--client-id), with another store (--store)",
            )
    except BaseException:
        store.close()
        raise
    return store, identity


def open_store(folder: Path) -> tuple[Store, Identity]:
    """The device in `folder`. Raises `StoreError` or `KeyUnavailableError`."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise StoreError(
            f"there is no store in {folder}", hint=f"enrol this device first: `fedloop agent enrol DIR --store {quoted(folder)}`"
        )
    store = Store.open(path, keys.load(folder))
    stored = store.kept(_IDENTITY)
    if stored is None:
        store.close()
        raise StoreError(
            f"the device in {folder} was never enrolled to the end",
            hint=f"enrol it again: `fedloop agent enrol DIR --store {quoted(folder)}`",
        )
    return store, msgspec.msgpack.decode(stored, type=Identity)


def _enrolled(store: Store, writer: EventWriter, reader: Reader[Identities], client_id: str) -> Client | None:
    """Whom the log has under this name, once what is due has been appended."""
    try:
        Outbox(store, writer).flush(writer.log)
        reader.catch_up()
    except NotAllowedError:
        return None  # a gateway rejects who has the name without the key
    return reader.fold.clients.get(client_id)


def _write(store: Store, identity: Identity, log: EventLog) -> None:
    writer = identity.writer(log)
    with store.transaction():
        store.keep(_IDENTITY, msgspec.msgpack.encode(identity))
        Outbox(store, writer).add(
            lambda seq: types.ClientEnrolled(
                origin=identity.origin,
                client_id=identity.client_id,
                seq=seq,
                public_key=writer.key.public_key,
                node_id=str(identity.node_id),
                epsilon=identity.epsilon,
                delta=identity.delta,
            )
        )


def _check_terms(client_id: str | None, epsilon: float | None, delta: float) -> None:
    if client_id is not None:
        try:
            msgspec.convert(client_id, types.Identifier)
        except msgspec.ValidationError:
            raise UsageError(f"client_id must be {types.IDENTIFIER_RULE}, not {client_id!r}") from None
        if client_id == "server":
            raise UsageError("client_id must not be 'server'")
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise UsageError(
            f"epsilon must be positive and finite, not {epsilon!r}", hint="None (--no-dp) allows rounds without privacy"
        )
    if not 0 < delta < 1:
        raise UsageError(f"delta must be between 0 and 1, not {delta!r}", hint="well below 1 / number of examples")


def _check_same(identity: Identity, known: Identities, client_id: str | None, epsilon: float | None, delta: float) -> None:
    if known.server_key != identity.server_key:
        raise UsageError("the store belongs to another deployment", hint="choose another store folder (--store)")
    if client_id not in (None, identity.client_id) or (epsilon, delta) != (identity.epsilon, identity.delta):
        raise UsageError(
            f"the store holds the device {identity.client_id} with epsilon {identity.epsilon} and delta {identity.delta}",
            hint="its budget is for life: enrol with these, or choose another store folder (--store)",
        )


def _holds(path: Path) -> bool:
    """Whether a store is there; one that was never begun is an empty file."""
    return path.is_file() and path.stat().st_size > 0


def _private(folder: Path) -> Path:
    """Make the folder; one that is empty becomes its owner's alone, one that is in use stays as it is."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            folder.chmod(0o700)
    except OSError as error:
        raise StoreError(f"the store folder {folder} cannot be made", cause=reason(error, folder)) from None
    return folder

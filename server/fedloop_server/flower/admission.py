"""Which replies count: everything that is checked before a strategy sees a tensor.

That the event is by its client is checked by whoever reads the log (`Identities.authenticate`). What is hashed is what is
parsed, in one read. That noise was really added cannot be seen from an update.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import fedloop_tasks.updates as updates
import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.tensors import MAX_HEADER_BYTES, TensorSpec
from fedloop_events.errors import BlobError, TensorError
from fedloop_events.types import BlobRef, Content, InstructionSent, Mechanism, RoundOpened, UpdateSubmitted
from msgspec import Struct
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
LedgerCheck = Callable[[str, int, Mechanism, str], str | None]
"""(client, spend_seq, mechanism, instruction) -> why the ledger does not pay for it, as a stable code; None if it does."""
HeartbeatCheck = Callable[[str], int]
"""client -> how many examples its last heartbeat reports at least."""
MAX_WEIGHT: Final = 2.0**40
"""Where nobody says what a reply outside a round may weigh: its app counts what it likes."""
_GROWTH: Final = 4
"""A heartbeat reports a power of two, up to twice which is meant; and a device may have doubled its examples since."""
_BLOCK: Final = 1 << 16


class UpdateRefusal(NamedTuple):
    """Why a reply does not count: a stable code, and a detail without anything of its content."""

    reason: str
    detail: str = ""


BLOB_ABSENT: Final = UpdateRefusal("blob-absent", "the store does not hold the update's blob")
"""The one refusal that time can heal: a blob may arrive after its event."""
DUPLICATE: Final = UpdateRefusal("duplicate", "the client has answered this instruction before, with something else")
NOT_ADDRESSED: Final = UpdateRefusal("not-addressed", "the instruction was sent to another client")
INCONSISTENT: Final = UpdateRefusal("inconsistent", "most replies hold other records or metrics")


class ExpectedReply(Struct, frozen=True):
    """What a reply to one instruction must hold: exactly `specs`, or one of the `smaller`, in one array record, or no arrays if
    there are none.

    With `opened`, the terms of its round too; `base` are the values from which the norm of an update is measured (None: zero).
    """

    specs: Sequence[TensorSpec] = ()
    opened: RoundOpened | None = None
    base: Arrays | None = None
    smaller: Sequence[Sequence[TensorSpec]] = ()


class Admission:
    """Checks replies. `weight_key` names the metric that strategies weigh by.

    With `examples_at_least`, an update of a round without a mechanism weighs no more than its client's heartbeats make plausible.
    `max_weight` is the most that any reply may weigh: say it for a plain Flower run whose clients are not trusted, for there no
    heartbeat counts what its app counts. `refuse_unchanged` refuses an update that equals its base: Flower's DP wrappers divide
    by its norm.
    """

    def __init__(
        self,
        *,
        ledger_check: LedgerCheck | None = None,
        examples_at_least: HeartbeatCheck | None = None,
        weight_key: str = "num-examples",
        max_weight: float = MAX_WEIGHT,
        refuse_unchanged: bool = False,
    ) -> None:
        self._ledger_check, self._examples_at_least = ledger_check, examples_at_least
        self.weight_key, self.refuse_unchanged = weight_key, refuse_unchanged
        self._max_weight = max_weight

    def check(
        self, update: UpdateSubmitted, sent: InstructionSent, terms: ExpectedReply, reader: TensorReader
    ) -> UpdateRefusal | None:
        """Why `update` is not an acceptable answer to `sent`; None if it is. Raises UnreachableError if the store is away."""
        return (
            (NOT_ADDRESSED if update.client_id != sent.client_id else None)
            or self._round(update, terms.opened)
            or self._metrics(update, terms.opened)
            or self._arrays(update, terms, reader)
        )

    def weight(self, update: UpdateSubmitted, opened: RoundOpened | None) -> float:
        """An accepted update's weight in the merge: equal under DP, where example counts are private too; else as the client
        counts, and at most the round's `max_weight`."""
        if opened is not None and opened.mechanism is not None:
            return 1.0
        weights = [metrics[self.weight_key] for metrics in update.content.metrics.values() if self.weight_key in metrics]
        weight = float(weights[0]) if weights and not isinstance(weights[0], list) else 1.0
        return weight if opened is None or opened.max_weight is None else min(weight, opened.max_weight)

    def _round(self, update: UpdateSubmitted, opened: RoundOpened | None) -> UpdateRefusal | None:
        if update.round_id != (opened and opened.round_id):
            return UpdateRefusal("wrong-round", "the update names another round than its instruction")
        if opened is None:
            return None
        if update.base_release != opened.base_release:
            return UpdateRefusal("wrong-base", f"the round starts from {opened.base_release}")
        if update.mechanism != opened.mechanism:
            return UpdateRefusal("wrong-mechanism", "the mechanism is not the one that the round fixes")
        if opened.mechanism is None:
            return None
        if update.spend_seq is None:
            return UpdateRefusal("no-spend", "the update names no ledger entry that pays for it")
        if self._ledger_check is None:
            return None
        code = self._ledger_check(update.client_id, update.spend_seq, opened.mechanism, update.instruction_id)
        return UpdateRefusal("wrong-spend", f"ledger: {code}"[:200]) if code else None

    def _metrics(self, update: UpdateSubmitted, opened: RoundOpened | None) -> UpdateRefusal | None:
        for metrics in update.content.metrics.values():
            values = [each for value in metrics.values() for each in (value if isinstance(value, list) else [value])]
            if not all(_finite(value) for value in values):
                return UpdateRefusal("metrics-not-finite")
            weight = metrics.get(self.weight_key, 1)
            if isinstance(weight, list) or not 0 < weight <= self._max_weight:
                allowed = f"one number above 0 and at most {self._max_weight:,.0f}"
                return UpdateRefusal("wrong-weight", f"{self.weight_key} must be {allowed}")
            if opened is not None and opened.mechanism is not None and weight != 1:
                return UpdateRefusal("wrong-weight", f"under differential privacy {self.weight_key} must be 1")
            if opened is None or self._examples_at_least is None:
                continue
            if weight > (most := _GROWTH * max(self._examples_at_least(update.client_id), 1)):
                return UpdateRefusal("implausible-weight", f"by the client's heartbeat {self.weight_key} is at most {most:,}")
        return None

    def _arrays(self, update: UpdateSubmitted, terms: ExpectedReply, reader: TensorReader) -> UpdateRefusal | None:
        refs = list(update.content.arrays.values())
        if len(refs) != (1 if terms.specs else 0):
            return UpdateRefusal("wrong-records", f"there must be {1 if terms.specs else 'no'} array record")
        if not refs:
            return None
        if refusal := _size(refs[0], terms):
            return refusal
        if not reader.blobs.exists(refs[0]):
            return BLOB_ABSENT
        try:
            arrays = reader.tensors(refs[0])
            found = tensors.specs(arrays)
            if found not in terms.smaller:
                tensors.check(found, terms.specs)
        except BlobError:
            return UpdateRefusal("wrong-bytes", "the blob's bytes are not those that its name promises")
        except TensorError:
            return UpdateRefusal("wrong-tensors", f"there must be exactly the {len(terms.specs)} tensors of the instruction")
        return self._values(arrays, terms)

    def _values(self, arrays: Arrays, terms: ExpectedReply) -> UpdateRefusal | None:
        if terms.opened is None:
            if not all(_all_finite(values) for values in arrays.values()):
                return UpdateRefusal("not-finite")
        else:
            changes = updates.changes(arrays) if updates.bits(terms.opened) < 32 else _differences(arrays, terms.base)
            norm, bound = _norm(changes), terms.opened.max_update_norm
            if not math.isfinite(norm):
                return UpdateRefusal("not-finite")
            if not (norm <= bound):
                return UpdateRefusal("norm", f"the update's norm is above {bound:g}")
        if not self.refuse_unchanged or terms.base is None:
            return None
        if terms.opened is not None and updates.bits(terms.opened) < 32:
            unchanged = not any(piece.any() for piece in updates.changes(arrays))
        else:
            unchanged = all(np.array_equal(values, terms.base[name][tensors.first(values)]) for name, values in arrays.items())
        return UpdateRefusal("unchanged", "the update equals its base") if unchanged else None


def inconsistent(contents: Sequence[Content]) -> set[int]:
    """Indices of the contents whose records, metric names or list lengths differ from those of most of them.

    Flower's strategies give up a whole round for one such reply. Of equally frequent layouts the first one holds.
    """
    layouts = [_layout(content) for content in contents]
    if not layouts:
        return set()
    usual = Counter(layouts).most_common(1)[0][0]
    return {index for index, layout in enumerate(layouts) if layout != usual}


def distance(arrays: Arrays, base: Arrays | None) -> float:
    """The L2 norm of `arrays`, or of their difference from `base`, of which they may be the first rows and columns, in float64;
    not finite if any value is not."""
    return _norm(_differences(arrays, base))


def _differences(arrays: Arrays, base: Arrays | None) -> Iterator[NDArray[Any]]:
    for name, values in arrays.items():
        flat, origin = values.reshape(-1), None if base is None else base[name][tensors.first(values)].reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            if origin is not None:
                block -= origin[start : start + _BLOCK]
            yield block


def _norm(blocks: Iterable[NDArray[Any]]) -> float:
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks:
            wide = block.astype(np.float64, copy=False)
            total += float(np.dot(wide, wide))
    return math.sqrt(total) if total >= 0 else math.nan


def _layout(content: Content) -> tuple[object, ...]:
    metrics = (
        (name, tuple(sorted((key, len(value) if isinstance(value, list) else -1) for key, value in record.items())))
        for name, record in content.metrics.items()
    )
    return (tuple(sorted(content.arrays)), tuple(sorted(metrics)))


def _size(ref: BlobRef, terms: ExpectedReply) -> UpdateRefusal | None:
    """Whether the blob can be what the specs imply, before a byte of it is fetched."""
    data_bytes = sum(spec.size_bytes for spec in terms.specs)
    least_bytes = sum(spec.size_bytes for spec in terms.smaller[-1]) if terms.smaller else data_bytes
    if not least_bytes < ref.size_bytes <= data_bytes + 8 + MAX_HEADER_BYTES:
        return UpdateRefusal("wrong-size", f"the tensors have {data_bytes:,} bytes")
    if terms.opened is not None and ref.size_bytes > terms.opened.max_upload_bytes:
        return UpdateRefusal("wrong-size", f"an update has at most {terms.opened.max_upload_bytes:,} bytes")
    return None


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _all_finite(values: NDArray[Any]) -> bool:
    if values.dtype.kind != "f":
        return True
    flat = values.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            # A sum is not finite if a value is not; the reverse, an overflow, is rare enough to look again.
            if not np.isfinite(block.sum()) and not np.isfinite(block).all():
                return False
    return True

"""The privacy gate: whether a device answers an instruction, before any data is touched: by the log, and by its owner's terms."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from fedloop_events import types
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.errors import BlobError, TensorError
from fedloop_privacy.dp.accounting import MechanismError, validate
from fedloop_tasks import updates
from fedloop_tasks.table import PROGRAMS
from fedloop_tasks.task import ModelError, TermsError, TooLittleMemoryError

from fedloop_clients.device import Device
from fedloop_clients.device_view import Instruction
from fedloop_clients.eligibility import DAY_S
from fedloop_clients.ranks import RankTooHighError, rank_for

if TYPE_CHECKING:
    from fedloop_events.flower.messages import ClientAppCallable

MAX_DOWNLOAD_BYTES: Final = 4 << 30

Opened = types.RoundOpened | None


class Apps(NamedTuple):
    """The Flower `ClientApp`s on a device: those of certain runs, and the one for what belongs to no round in all other runs."""

    of_run: Mapping[str, ClientAppCallable] = MappingProxyType({})
    default: ClientAppCallable | None = None

    def serving(self, sent: types.InstructionSent) -> ClientAppCallable | None:
        """The app that serves an instruction; None if it is the task's."""
        return self.of_run.get(sent.run_id, self.default if sent.round_id is None else None)


class NotYet(Exception):  # noqa: N818 (a decision, not an error)
    """The instruction cannot be answered yet: what it needs is still on its way."""


class Decline(NamedTuple):
    """Why an instruction is declined: a stable code, and a detail that holds nobody's words."""

    reason: str
    detail: str = ""
    would_be_epsilon: float | None = None


class Gate:
    """The gate of one device, the same for the task and for every app."""

    def __init__(self, device: Device, apps: Apps, reader: TensorReader) -> None:
        self._device, self._apps, self._reader = device, apps, reader

    def too_late(self, instruction: Instruction, opened: Opened, known_s: float) -> bool:
        """By what the server has decided since, and by how long this process has known it: no other clock decides anything."""
        sent = instruction.sent
        if sent.round_id is not None and opened is None:
            return True  # closed, aborted, or opened by a server that was fenced
        age_s = max((self._device.view.now_ms - instruction.record.appended_ms) / 1000, known_s)
        return age_s > (min(sent.ttl_s, opened.deadline_s) if opened else sent.ttl_s)

    def refusal(self, instruction: Instruction, opened: Opened) -> Decline | None:
        """Why the instruction is declined, or None. Raises `NotYet`."""
        sent, mechanism = instruction.sent, opened.mechanism if opened else None
        if instruction.event_id in self._device.view.spent:
            return Decline("interrupted")
        if mechanism is None and self._device.identity.epsilon is not None:
            return Decline("not-private")
        if mechanism is not None and sent.message_type.partition(".")[0] != "train":
            return Decline("not-private", "the mechanism of a round pays for training alone")
        if unmet := self._unmet(instruction, opened):
            return unmet
        if opened is not None and (wrong := self._wrong_base(sent, opened)):
            return Decline(wrong)
        if self._apps.serving(sent) is None and (unready := self._unready(sent, opened)):
            return unready
        if mechanism is not None and (over := self._over_budget(mechanism)):
            return over
        return self._unreadable(sent, opened) or (
            self._too_small(opened) if opened and self._apps.serving(sent) is None else None
        )

    def _unmet(self, instruction: Instruction, opened: Opened) -> Decline | None:
        """The owner's terms. A further step of a round that the device is in already comes neither too soon nor too often."""
        terms = self._device.settings.eligibility
        if (code := terms.unmet(self._device.around)) is not None or opened is None:
            return None if code is None else Decline(code)
        code = terms.too_often(self._device.joined.others(opened), instruction.record.appended_ms)
        return None if code is None else Decline(code)

    def _too_small(self, opened: types.RoundOpened) -> Decline | None:
        """Whether the device can train the round, and its owner lets it: by the round's base alone, which can be read."""
        device = self._device
        assert device.spec is not None
        try:
            with device.models.borrowed(device.spec) as held:
                rank_for(held.model, opened, self._reader.tensors(opened.base), device.settings.rank)
                return None
        except TooLittleMemoryError as error:
            return Decline("no-memory", error.message)
        except RankTooHighError as error:
            return Decline("rank-too-high", error.message)
        except ModelError:
            return Decline("no-model")
        except TensorError:
            return Decline("wrong-base", "it has not the tensors of the round")

    def _unready(self, sent: types.InstructionSent, opened: Opened) -> Decline | None:
        """Why the task has nothing to answer with, though the round may be well."""
        device = self._device
        if opened is None:
            return Decline("no-app")
        if opened.model != device.settings.model or device.spec is None:
            return Decline("other-model")
        if sent.message_type != "train":
            return Decline("not-training")
        if opened.strategy not in PROGRAMS:
            return Decline("unknown-program")
        try:
            updates.bits(opened)
        except TermsError as error:
            return Decline("unknown-format", error.message)
        if device.count_examples() < device.settings.min_examples:
            return Decline("no-examples")
        return None

    def _wrong_base(self, sent: types.InstructionSent, opened: types.RoundOpened) -> str | None:
        """A device trains only on a release that the log has published, the same one for the whole round."""
        if self._device.identity.client_id not in opened.cohort:
            return "not-in-cohort"
        release = self._device.view.releases.releases.get(opened.base_release)
        if release is None:
            raise NotYet
        same = release.blob == opened.base and all(ref == opened.base for ref in sent.content.arrays.values())
        return None if same and release.status == "published" and release.model == opened.model else "wrong-base"

    def _over_budget(self, mechanism: types.Mechanism) -> Decline | None:
        # A second bound, beside `Eligibility.too_often`. That one counts rounds, by the store and the stamps of the instructions.
        # This one counts spends, so that many steps of one round drain no budget; by the log, for a store that was restored from
        # a backup has forgotten its rounds; and by a time that no single stamp moves.
        me, since_ms = self._device.identity, self._device.view.now_ms - DAY_S * 1000
        most = self._device.settings.eligibility.rounds_per_day
        if sum(each.spent_ms > since_ms for each in self._device.view.spent.values()) >= most:
            return Decline("too-many-rounds", f"at most {most} a day")
        try:
            over = self._device.view.ledger.check(me.client_id, validate(mechanism), me.epsilon, me.delta)
        except MechanismError:
            return Decline("bad-mechanism")
        return None if over is None else Decline(over.reason, over.detail, over.would_be_epsilon)

    def _unreadable(self, sent: types.InstructionSent, opened: Opened) -> Decline | None:
        """Before anything is spent: an instruction whose tensors are not there cannot be followed."""
        refs = {*sent.content.arrays.values(), *([opened.base] if opened else ())}
        if sum(ref.size_bytes for ref in refs) > MAX_DOWNLOAD_BYTES:
            return Decline("too-large")
        try:
            for ref in refs:
                self._reader.tensors(ref)
        except TensorError:
            return Decline("wrong-base", "no tensors")
        except BlobError as error:
            raise NotYet from error
        return None

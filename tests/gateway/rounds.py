"""A log with something in it of everybody: rounds of several devices, releases, what devices said."""

from __future__ import annotations

from typing import Any

import samples
from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import AcceptedUpdate, BlobRef, Content, Exclusion

SHA = "a" * 64
SOME = BlobRef(SHA, 1)
ORIGIN = samples.ORIGIN
COMMON: dict[str, Any] = {"origin": ORIGIN, "epoch": 1, "run_id": "main"}


def opened(*cohort: str, round_id: str = "r0001", base: BlobRef = SOME) -> types.RoundOpened:
    return types.RoundOpened(
        **COMMON,
        round_id=round_id,
        request_id="q",
        number=1,
        model="default",
        base_release="0000-x",
        base=base,
        strategy="ffa",
        cohort=list(cohort),
        quorum=1,
        deadline_s=600,
        upload=["x"],
        max_upload_bytes=10_000,
        max_update_norm=10.0,
    )


def instruction(client_id: str, blob: BlobRef = SOME, round_id: str | None = "r0001") -> types.InstructionSent:
    return types.InstructionSent(
        **COMMON,
        step=0,
        client_id=client_id,
        message_type="train",
        content=Content(arrays={"arrays": blob}),
        content_sha256=SHA,
        round_id=round_id,
    )


def ask(log: EventLog, client_id: str, round_id: str | None = None) -> str:
    """The id of a new instruction to the client, of a round that is opened for it (None: of no round)."""
    if not any(record.type == types.EpochStarted.type_name for record in read_all(log)):
        log.append([samples.signed(samples.epoch())])
    if round_id is not None:
        log.append([samples.signed(opened(client_id, round_id=round_id))])
    event = samples.signed(instruction(client_id, round_id=round_id))
    log.append([event])
    return event.id


def submitted(client_id: str, blob: BlobRef, seq: int = 5) -> types.UpdateSubmitted:
    return types.UpdateSubmitted(
        origin=ORIGIN,
        client_id=client_id,
        seq=seq,
        run_id="main",
        instruction_id="0" * 32,
        content=Content(arrays={"arrays": blob}),
    )


def closed(*accepted: str, excluded: tuple[str, ...] = (), blob: BlobRef = SOME) -> types.RoundClosed:
    return types.RoundClosed(
        **COMMON,
        step=1,
        round_id="r0001",
        accepted=[AcceptedUpdate(client_id=name, update_id="0" * 32, instruction_id="0" * 32, blob=blob) for name in accepted],
        excluded=[Exclusion(name, "late") for name in excluded],
    )


def published(blob: BlobRef) -> tuple[types.ReleaseProposed, types.ReleasePublished]:
    common: dict[str, Any] = {"origin": ORIGIN, "model": "default", "epoch": 1, "release": "0001-x", "number": 1, "blob": blob}
    return types.ReleaseProposed(**common), types.ReleasePublished(**common)


def evaluated(scores: BlobRef) -> types.ReleaseEvaluated:
    return types.ReleaseEvaluated(
        origin=ORIGIN,
        model="default",
        epoch=1,
        release="0001-x",
        metrics={"accuracy": 0.5},
        leading="accuracy",
        examples=2,
        dataset_sha256=SHA,
        scores=scores,
    )


def masked(client_id: str, seq: int = 3) -> types.TextMasked:
    return types.TextMasked(origin=ORIGIN, client_id=client_id, seq=seq, feedback_id="f0")


def everything(log: EventLog, blobs: BlobStore) -> dict[str, BlobRef]:
    """Say all of it in order, for device-1 (chosen), device-2 (chosen, late) and device-3 (not chosen); the blobs by name."""
    names = ("release", "instruction-1", "instruction-2", "update-1", "update-2", "secret", "scores")
    refs = {name: blobs.put([name.encode() * 10]) for name in names}
    said: list[types.Payload] = [
        samples.epoch(),
        types.RoundRequested(origin=ORIGIN, run_id="main", request_id="q", reason="drift"),
        *published(refs["release"]),
        evaluated(refs["scores"]),
        opened("device-1", "device-2", base=refs["release"]),
        types.NodesListed(**COMMON, step=0, node_ids=["11", "12", "13"]),
        instruction("device-1", refs["instruction-1"]),
        instruction("device-2", refs["instruction-2"]),
        submitted("device-1", refs["update-1"]),
        submitted("device-2", refs["update-2"]),
        types.UpdateRefused(**COMMON, client_id="device-2", update_id="0" * 32, reason="norm"),
        closed("device-1", excluded=("device-2",), blob=refs["update-1"]),
        types.ResultRecorded(**COMMON, step=2, content=Content(arrays={"sums": refs["secret"]})),
        opened("device-3", round_id="r0002", base=refs["release"]),
        types.RoundAborted(**COMMON, round_id="r0002", reason="quorum"),
        types.EventQuarantined(origin=ORIGIN, source_topic="updates", event_id="0" * 32, reason="bad"),
        samples.revoked("device-4"),
    ]
    for name in ("device-1", "device-2", "device-3"):
        said += [samples.feedback(2, name), masked(name), samples.seen(name, 4)]
    log.append([samples.signed(payload) for payload in said])
    return refs

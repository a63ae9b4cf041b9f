"""How fast the command line answers: `fedloop --help`, and `fedloop round list` on a log of 100,000 events."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TypedDict

from fedloop_events import ids, locations, types
from fedloop_events.logs.port import EventLog
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter

from benchmarks.harness import Row, costs, in_turn, scratch, seconds

CLIENTS = 8
ROUNDS = 200
HELP_S, LIST_S = 0.3, 1.0


class _Common(TypedDict):
    origin: str
    epoch: int
    run_id: str


def rows(quick: bool = False) -> list[Row]:
    """Against the bound in seconds, and against `python -c pass`, of which both pay the start."""
    runs = 1 if quick else 7
    with scratch() as folder:
        events = fill(folder, 10_000 if quick else 100_000)
        commands = [
            ("-c", "pass"),
            ("-m", "fedloop_cli.main", "--help"),
            ("-m", "fedloop_cli.main", "round", "list", str(folder), "--json"),
        ]
        times = in_turn([partial(seconds, partial(_run, *command)) for command in commands], runs=runs, warm=1)
    show_help, list_rounds, python = "`fedloop --help`", f"`fedloop round list`, {events:,} events", "`python -c pass`"
    return [
        costs(show_help, f"{HELP_S:g} s, the bound", [(help_s, HELP_S) for _, help_s, _ in times], "s", 1.0),
        costs(show_help, python, [(help_s, bare_s) for bare_s, help_s, _ in times], "s"),
        costs(list_rounds, f"{LIST_S:g} s, the bound", [(list_s, LIST_S) for _, _, list_s in times], "s", 1.0),
        costs(list_rounds, python, [(list_s, bare_s) for bare_s, _, list_s in times], "s"),
    ]


def fill(folder: Path, events: int) -> int:
    """A log as a deployment of eight devices leaves it: `ROUNDS` rounds, and feedback with the counts of what was masked."""
    log = locations.open_log(folder, create=True)
    server, devices = SigningKey.generate(), [SigningKey.generate() for _ in range(CLIENTS)]
    origin, writer = "bench", EventWriter(log, server)
    writer.append(types.DeploymentCreated(origin=origin, public_key=server.public_key))
    names = [f"device-{number}" for number in range(CLIENTS)]
    for number, (name, key) in enumerate(zip(names, devices, strict=True)):
        enrolled = types.ClientEnrolled(
            origin=origin, client_id=name, seq=0, public_key=key.public_key, node_id=str(number + 1), epsilon=8.0, delta=1e-5
        )
        EventWriter(log, key).append(enrolled)
    writer.append(types.EpochStarted(origin=origin, epoch=1, run_id="main", server_id="bench"))
    writer.append(types.RoundRequested(origin=origin, run_id="main", request_id="all", rounds=ROUNDS))
    writers = [EventWriter(log, key) for key in devices]
    seqs = [1] * CLIENTS
    for number in range(1, ROUNDS + 1):
        _round(writer, writers, names, seqs, origin, number)
    rest = events - log.end().offsets["log"]
    for first in range(0, rest, 1000):
        _masked(log, writers, names, seqs, origin, min(1000, rest - first))
    log.close()
    return events


def _round(writer: EventWriter, writers: list[EventWriter], names: list[str], seqs: list[int], origin: str, number: int) -> None:
    common: _Common = {"origin": origin, "epoch": 1, "run_id": "main"}
    round_id, blob = f"r{number:04d}", types.BlobRef("0" * 64, 200_000)
    opened = types.RoundOpened(
        **common, round_id=round_id, request_id="all", number=number, model="default", base_release="0000-x", base=blob,
        strategy="ffa", cohort=names, quorum=2, deadline_s=60.0, upload=["head.weight"],
        max_upload_bytes=1 << 20, max_update_norm=1e5,
    )  # fmt: skip
    content = types.Content(arrays={"arrays": blob})
    writer.append(opened)
    sent = [
        types.InstructionSent(
            **common, step=step, client_id=name, message_type="train", content=content, content_sha256="0" * 64, round_id=round_id
        )
        for step, name in enumerate(names)
    ]
    instructions = writer.append(*sent)
    accepted = []
    for index, (name, instruction) in enumerate(zip(names, instructions, strict=True)):
        update = types.UpdateSubmitted(
            origin=origin, client_id=name, seq=seqs[index], run_id="main", instruction_id=instruction.id, content=content,
            round_id=round_id,
        )  # fmt: skip
        seqs[index] += 1
        (event,) = writers[index].append(update)
        accepted.append(types.AcceptedUpdate(name, event.id, instruction.id, blob))
    writer.append(types.RoundClosed(**common, step=len(names), accepted=accepted, round_id=round_id))


def _masked(log: EventLog, writers: list[EventWriter], names: list[str], seqs: list[int], origin: str, count: int) -> None:
    events = []
    for number in range(count):
        index = number % CLIENTS
        counts = {"PERSON": 1, "EMAIL_ADDRESS": 1}
        payload = types.TextMasked(
            origin=origin, client_id=names[index], seq=seqs[index], feedback_id=ids.new_id(), counts=counts
        )
        seqs[index] += 1
        events.append(writers[index].event(payload))
    log.append(events)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

"""The demo's users: which messages they write on which device, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from fedloop_events.errors import UsageError
from fedloop_tasks.task import Material, Message, Messages, Task
from msgspec import Struct
from msgspec.structs import replace

from fedloop_cli import corpus

CONCENTRATION: Final = 1.0
"""Of the Dirichlet distribution over devices, for each answer: the smaller, the more the devices differ (arXiv 1909.06335)."""
FIRST_WAVE, FIRST_SPOKEN_WAVE = 0.36, 0.8
"""Share of the messages that is written before the first round."""
SHIFT: Final = 0.4
"""Share of a device's messages before which its user asks of half of everything, and after which mostly of the other half."""
SPOKEN, ASKED = 200, 30
"""Messages of a device whose model writes its answers, and how many of them are asked now: an answer takes a second."""
SPOKEN_HELD_OUT, PAIRS = 60, 24
"""Messages to measure it with, and how many of them come with a worse answer: one to something else."""
SHAPE: Final = {"layers": 4}
"""Of the adapters of such a model: half as many as usual, for speed, and because the noise grows with them."""


class Users(Struct, frozen=True):
    """Everything the simulation knows. `planted` are the personal values in the messages by type, as they stand there, and
    `ordinary` the words, in lower case, that they hold besides."""

    devices: list[list[Message]]
    material: Material
    planted: set[tuple[str, str]]
    ordinary: set[str]
    skipped: dict[str, int]


def invented(task: type[Task], devices: int, seed: int) -> Users:
    """The corpus that comes with the package: all of it for a model that picks an answer, `SPOKEN` messages a device for one that
    writes its own."""
    spoken = task.speaks
    messages = corpus.load("train", spoken=spoken)[: SPOKEN * devices if spoken else None]
    held_out = corpus.load("test", spoken=spoken)[: SPOKEN_HELD_OUT if spoken else None]
    material = task.material_of(_messages("train", messages), _messages("test", held_out))
    if spoken:
        public = _messages("public", corpus.public()).rows
        material = replace(material, held_out=_with_worse(material.held_out), public=public, shape=SHAPE)
    planted = {pair for each in messages for pair in each.planted}
    spread_out = spread(_messages("train", messages).rows, devices, seed)
    if not spoken:
        spread_out = shifted(spread_out)
    return Users(spread_out, material, planted, corpus.ordinary_words(), {})


def _with_worse(messages: Sequence[Message]) -> list[Message]:
    """The first `PAIRS` with the next other answer as the worse one."""
    answers = list(dict.fromkeys(each.answer for each in messages))
    after = dict(zip(answers, [*answers[1:], *answers[:1]], strict=True))
    return [replace(each, rejected=after[each.answer]) for each in messages[:PAIRS]] + [*messages[PAIRS:]]


def _messages(name: str, found: Sequence[corpus.CorpusMessage]) -> Messages:
    rows = [Message(each.text, each.answer) for each in found]
    return Messages(Path(name), rows, [*range(1, len(rows) + 1)])


def from_files(task: type[Task], train: Messages, held_out: Messages, devices: int, seed: int) -> Users:
    """Any messages. Nothing is planted in them, so no leak can be searched for. Raises `UsageError`."""
    material = replace(task.material_of(train, held_out), shape=SHAPE if task.speaks else {})
    if len(train.rows) < 2 * devices:
        raise UsageError(f"{train.path} has {len(train.rows)} messages for {devices} devices", hint="two for each are the least")
    spread_out = spread(train.rows, devices, seed)
    if not task.speaks:
        spread_out = shifted(spread_out)
    skipped = {f"{train.path.name}: {what}": count for what, count in train.skipped.items()}
    skipped |= {f"{held_out.path.name}: {what}": count for what, count in held_out.skipped.items()}
    return Users(spread_out, material, set(), set(), skipped)


def spread(messages: Sequence[Message], devices: int, seed: int) -> list[list[Message]]:
    """Each message on one device, unevenly by answer and in number, every device with two at least; the order is drawn too."""
    rng = np.random.default_rng(seed)
    spread_out: list[list[Message]] = [[] for _ in range(devices)]
    for answer in sorted({message.answer for message in messages}):
        alike = [message for message in messages if message.answer == answer]
        shares = rng.dirichlet([CONCENTRATION] * devices)
        for message, device in zip(alike, rng.choice(devices, len(alike), p=shares), strict=True):
            spread_out[int(device)].append(message)
    for poor in spread_out:
        while len(poor) < 2:
            poor.append(max(spread_out, key=len).pop())
    return [[device[i] for i in rng.permutation(len(device))] for device in spread_out]


def shifted(devices: Sequence[Sequence[Message]]) -> list[list[Message]]:
    """The same messages in an order in which what users ask shifts: at first it has every other answer alone."""
    early = {*sorted({message.answer for messages in devices for message in messages})[::2]}
    ordered = []
    for messages in devices:
        first = [message for message in messages if message.answer in early][: round(SHIFT * len(messages))]
        chosen = {*map(id, first)}
        ordered.append([*first, *(message for message in messages if id(message) not in chosen)])
    return ordered


def waves(messages: int, rounds: int, first_wave: float) -> list[int]:
    """How many of a device's messages have been written before each round: before the first that share of them."""
    first = messages if rounds == 1 else max(1, round(first_wave * messages))
    return [first + round((messages - first) * number / max(1, rounds - 1)) for number in range(rounds)]

"""Made `format_1.sqlite`, once. It is never made again: what it holds must replay for ever.

A log of format 1 as the first release wrote it: a deployment, two devices, feedback in its versions 1 and 2, and a revocation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import samples
from fedloop_events import envelope, ids, signatures
from fedloop_events.envelope import Event
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import FeedbackRecordedV1


def feedback_v1(number: int, score: int) -> Event:
    new = samples.feedback(number)
    old = FeedbackRecordedV1(
        origin=new.origin,
        client_id=new.client_id,
        seq=new.seq,
        feedback_id=new.feedback_id,
        response_id=new.response_id,
        release=new.release,
        text=new.text,
        predicted="lost_card",
        score=score,
        rating=4,
        label="lost_card",
        correction=samples.masked("<PERSON_1> lost it"),
        comment=samples.masked("thanks"),
    )
    template = envelope.encode(new, id=ids.derived_id("recorded", number), time_s=1_800_000_000)
    event = msgspec.structs.replace(template, type="io.fedloop.feedback.recorded.v1", data=msgspec.json.encode(old))
    return signatures.sign(event, samples.key(new.client_id))


def main(path: Path) -> None:
    log = SqliteLog(path)
    log.append([samples.signed(samples.created(), number=1), samples.signed(samples.enrolled(), number=2)])
    log.append([samples.signed(samples.enrolled("device-2", "12"), number=3), samples.signed(samples.seen(), number=4)])
    log.append([feedback_v1(2, 1), feedback_v1(3, -1), feedback_v1(4, 0)])
    log.append([samples.signed(samples.feedback(5), number=5), samples.signed(samples.epoch(), number=6)])
    log.append([samples.signed(samples.revoked("device-2"), number=7)])
    log.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

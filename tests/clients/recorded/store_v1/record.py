"""Made what lies beside it, once, with the program whose stores are of version 1. It is never made again: it must open for ever.

`device/` is the store of one device with its key, `deployment/` the log that it is a client of, `expected.json` what the program
of version 1 found in both. The key was made for this test, opens this store alone, and protects nobody's words: all of them are
invented here.
"""

# mypy: ignore-errors
# It calls the program as it was then.

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from clients.conftest import LABELS, Deployment, DigitMasker
from fedloop_clients import Agent
from fedloop_clients.capture import FeedbackInput
from fedloop_events.errors import UnreachableError
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    context.state["calls"] = MetricRecord({"n": 1})
    arrays = ArrayRecord({"x": Array(np.ones(3, np.float32))})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


class Recorder:
    """A device, and all that its user has said."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.given: list[dict[str, Any]] = []

    def respond(self, text: str, label: str = "card-lost", *, masked: bool = False) -> str:
        """A response, masked when it was made as `predict` does, or later as with `record`; its id tells which."""
        release = self.agent._in_force()[1].release
        name = f"{'masked' if masked else 'plain'}-{text.split()[0]}"
        return self.agent._capture.respond(text, DigitMasker().mask(text) if masked else None, label, release, LABELS, name)

    def say(self, response_id: str, **said: Any) -> None:
        feedback_id = f"f-{len(self.given):02}"
        teaches = self.agent.feedback(response_id, **said, feedback_id=feedback_id).teaches
        self.given.append({"feedback_id": feedback_id, "response_id": response_id, "said": said, "teaches": teaches})

    def every_kind(self, prefix: str, *, masked: bool) -> None:
        for name, said in {
            "up": {"thumb": "up"},
            "down": {"thumb": "down"},
            "five": {"rating": 5},
            "three": {"rating": 3},
            "mixed": {"thumb": "down", "rating": 5},
            "label": {"thumb": "down", "label": "loan"},
            "written": {"correction": " Loan\n"},
            "edit": {"correction": "it was about account 99 00"},
            "both": {"rating": 2, "correction": "transfer", "comment": "no, 4711"},
            "comment": {"comment": "thanks, 4711"},
        }.items():
            self.say(self.respond(f"{prefix}-{name} card 4711", masked=masked), **said)
        again = self.respond(f"{prefix}-again card 4711", masked=masked)
        for said in ({"thumb": "down"}, {"rating": 5}, {"comment": "at last"}):
            self.say(again, **said)
        named = self.respond(f"{prefix}-named card 4711", masked=masked)
        for said in ({"label": "transfer"}, {"correction": "loan"}, {"thumb": "down", "comment": "not what I asked"}):
            self.say(named, **said)
        taken_back = self.respond(f"{prefix}-back card 4711", masked=masked)
        for said in ({"thumb": "up"}, {"correction": "something else"}):
            self.say(taken_back, **said)


def record(folder: Path) -> list[dict[str, Any]]:
    deployment = Deployment(folder / "deployment")
    deployment.register()
    deployment.release()
    agent = Agent.enrol(deployment.folder, folder / "device", client_id="phone", key_from="file", app=app, masker=DigitMasker())
    with agent:
        phone = Recorder(agent)
        # Published, and a round that is paid for and answered, and one that is declined.
        phone.every_kind("sent", masked=True)
        phone.every_kind("late", masked=False)
        phone.respond("silent nobody judged 4711", masked=True)
        phone.respond("silent nobody judged 4711")
        deployment.ask("phone")
        deployment.ask("phone", None)
        agent.run(until=lambda status: status.settled and sum(status.answers.values()) == 2)
        # Failed, whatever of it cannot be masked.
        phone.say(phone.respond("unmaskable text 4711"), thumb="up")
        phone.say(phone.respond("comment card 4711", masked=True), thumb="up", comment="unmaskable 4711")
        phone.say(phone.respond("correction card 4711", masked=True), correction="Transfer", comment="explosive 4711")
        agent.run(until=lambda status: status.settled)
        # In the outbox, and not in the log.
        append = type(deployment.log).append

        def away(*_: object) -> None:
            raise UnreachableError("the log is away")

        phone.say(phone.respond("due card 4711", masked=True), rating=5, comment="0815")
        phone.say(phone.respond("due card 4711"), correction="transfer")
        type(deployment.log).append = away  # type: ignore[method-assign,assignment]
        agent.run(until=lambda status: bool(status.problem))
        type(deployment.log).append = append  # type: ignore[method-assign]
        # Captured, and nothing more.
        phone.every_kind("new", masked=True)
        phone.every_kind("raw", masked=False)
        phone.say("masked-sent-up", label="transfer")
        phone.say("plain-late-label", thumb="up", comment="but 4711")
    deployment.log.close()
    return phone.given


def digest(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(bytes(value)).hexdigest()


def observe(folder: Path) -> dict[str, Any]:
    """What the program of version 1 finds, in a copy."""
    with Agent.open(folder / "device", folder / "deployment") as agent:
        store, capture = agent._store, agent._capture
        found: dict[str, Any] = {
            "status": agent.status(),
            "examples": capture.examples(LABELS),
            "responses": [
                [response_id, text, masked and msgspec.json.decode(masked)["text"], predicted, release]
                for response_id, text, masked, predicted, release in store.rows("SELECT * FROM responses ORDER BY rowid")
            ],
            "feedback": store.rows("SELECT feedback_id, state, failure FROM feedback ORDER BY number"),
            "outbox": [
                [seq, event_id, digest(event)] for seq, event_id, event in store.rows("SELECT * FROM outbox ORDER BY seq")
            ],
            "answers": store.rows("SELECT * FROM answers ORDER BY instruction_id"),
            "contexts": [[run_id, digest(state)] for run_id, state in store.rows("SELECT * FROM contexts")],
            "kept": [[name, digest(value)] for name, value in store.rows("SELECT * FROM kept ORDER BY name")],
        }
        capture.retry_failed()
        found["unpublished"] = [
            {
                "feedback_id": each.feedback_id,
                "response_id": each.response_id,
                "text": each.text,
                "masked": each.masked and each.masked.text,
                "said": {
                    name: said for name in FeedbackInput.__struct_fields__ if (said := getattr(each.said, name)) is not None
                },
            }
            for each in capture.unpublished(1000)
        ]
    return found


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="store-v1-") as temporary:
        folder = Path(temporary)
        given = record(folder)
        for name in ("device", "deployment"):
            shutil.copytree(folder / name, target / name, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
        expected = observe(folder) | {"given": given}
        (target / "expected.json").write_bytes(msgspec.json.format(msgspec.json.encode(expected), indent=1) + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

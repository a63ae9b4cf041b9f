"""How this store was recorded, by the program whose stores were of version 3. It is not run again: what it wrote is kept.

PYTHONPATH=tests python record.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from clients.conftest import Deployment, DigitMasker
from fedloop_clients import Agent

root = Path(sys.argv[1])
made = Deployment(root / "deployment")
made.register()
made.release()
with Agent.enrol(root / "deployment", root / "device", client_id="phone", key_from="file", masker=DigitMasker()) as agent:

    def give(text: str, feedback_id: str, **given: str) -> None:
        response = agent.record(text, "card-lost", response=f"about {text}", response_id=f"r-{feedback_id}")
        agent.feedback(response.response_id, feedback_id=feedback_id, **given)  # type: ignore[arg-type]

    give("card 4711 is lost", "published", label="loan", correction="loan 17", comment="call 0815")
    give("money sent twice", "retracted", thumb="up")
    agent.run(until=lambda status: status.settled)
    agent.retract("retracted")
    agent.run(until=lambda status: status.settled)
    give("unmaskable words", "failed", thumb="up")
    agent.run(until=lambda status: status.settled)
    give("card 0815 is lost", "captured", correction="transfer 17", comment="at once")
    agent.record("another 4711", "loan", response_id="r-worse")
    agent.feedback("r-captured", feedback_id="compared", preferred_over="r-worse", thumb="up")
made.log.close()

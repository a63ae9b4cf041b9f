"""How this store was recorded, by the program whose stores were of version 4. It is not run again: what it wrote is kept.

PYTHONPATH=tests python record.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from clients.conftest import Deployment, DigitMasker
from fedloop_clients import Agent
from fedloop_tasks.turns import Turn

root = Path(sys.argv[1])
made = Deployment(root / "deployment")
made.register()
made.release()
with Agent.enrol(root / "deployment", root / "device", client_id="phone", key_from="file", masker=DigitMasker()) as agent:

    def give(text: str, feedback_id: str, **given: str) -> None:
        response = agent.record(text, "card-lost", response_id=f"r-{feedback_id}")
        agent.feedback(response.response_id, feedback_id=feedback_id, **given)  # type: ignore[arg-type]

    give("card 4711 is lost", "published", label="loan", signal="copied")
    agent.run(until=lambda status: status.settled)
    give("may I have a loan", "captured", label="loan", comment="at once 17")
    give("where is it", "thumb", thumb="up")
    turns = [Turn("user", "hello"), Turn("assistant", "what is it"), Turn("user", "is the card 4711 lost")]
    answer = agent._device.interactions.answer(turns, "no idea", "0000-a")
    agent.feedback(answer, feedback_id="corrected", correction="ask the bank")
made.log.close()

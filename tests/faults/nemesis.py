"""What goes wrong, drawn from a seed: brokers killed and frozen, producers cut off from a broker or frozen themselves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from faults.cluster import NODES, CutCluster
from msgspec import Struct

BACK_S: Final = 120.0
"""By when a broker that was away must have caught up."""


class Fault(Struct, frozen=True):
    """`victim` is a topic whose (first) leader is meant, or a producer; `seconds` how long it lasts."""

    kind: str
    victim: str
    seconds: float


class Happened(Struct, frozen=True):
    """A fault as it came to pass. `away_s`: until everything was in sync again."""

    began_s: float
    fault: Fault
    node: int
    away_s: float


def schedule(seed: int, victims: Sequence[str], producers: Sequence[str]) -> list[Fault]:
    """Every kind, in any order. A leader that is silent for 6 s is replaced, and a producer gives up after 8 s."""
    source = random.Random(seed)
    faults = [
        Fault("kill", source.choice(victims), 0.0),
        Fault("kill", source.choice(victims), source.uniform(1, 3)),
        Fault("freeze", source.choice(victims), source.uniform(1, 4)),
        Fault("freeze", source.choice(victims), source.uniform(7, 9)),
        Fault("hold", source.choice(victims), source.uniform(1, 3)),
        Fault("hold", source.choice(victims), source.uniform(9, 11)),
        Fault("refuse", source.choice(victims), source.uniform(1, 3)),
        Fault("stop", source.choice(producers), source.uniform(9, 11)),
    ]
    source.shuffle(faults)
    return faults


class Nemesis:
    """Never more than one broker is away: a fault begins when the last one is over and all are in sync. `wait_s` waits."""

    def __init__(
        self,
        cluster: CutCluster,
        prefix: str,
        producers: dict[str, int],
        wait: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._cluster, self._prefix, self._producers = cluster, prefix, producers
        self._wait, self._clock = wait, clock

    def inflict(self, fault: Fault) -> Happened:
        began = self._clock()
        if fault.kind == "stop":
            node = 0
            os.kill(self._producers[fault.victim], signal.SIGSTOP)
            try:
                self._wait(fault.seconds)
            finally:
                os.kill(self._producers[fault.victim], signal.SIGCONT)
        else:
            node = self._leader(fault.victim)
            self._send_away(fault, node)
        self.settle()
        return Happened(round(began, 2), fault, node, round(self._clock() - began, 2))

    def _send_away(self, fault: Fault, node: int) -> None:
        cluster, proxy = self._cluster, self._cluster.proxies[node - 1]
        match fault.kind:
            case "kill":
                cluster.kill(node)
                self._wait(fault.seconds)
                cluster.restart(node)
            case "freeze":
                cluster.pause(node)
                self._wait(fault.seconds)
                cluster.resume(node)
            case "hold" | "refuse":
                (proxy.hold if fault.kind == "hold" else proxy.refuse)()
                self._wait(fault.seconds)
                proxy.heal()

    def settle(self) -> None:
        """Wait until every partition is in sync on all nodes. A frozen broker is found out when it should have answered."""
        deadline = time.monotonic() + BACK_S
        self._wait(0.5)
        while (state := self._cluster.state(self._prefix)) is None or any(len(isr) < NODES for _, isr in state.values()):
            assert time.monotonic() < deadline, f"after {BACK_S:g} s not all are in sync: {state}"
            self._wait(0.2)

    def _leader(self, topic: str) -> int:
        deadline = time.monotonic() + BACK_S
        while True:
            state = self._cluster.state(self._prefix) or {}
            node = state.get((f"{self._prefix}.{topic}", 0), (-1, ()))[0]
            if node > 0:
                return node
            assert time.monotonic() < deadline, f"{topic} has no leader"
            self._wait(0.2)

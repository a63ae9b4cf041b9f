"""Three brokers on this machine, with a network of their own to cut between them and the producers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from brokers import Cluster, _free_ports
from confluent_kafka import KafkaException
from faults.proxy import Proxy

NODES: Final = 3
_ASK_S: Final = 2.0

State = Mapping[tuple[str, int], tuple[int, Sequence[int]]]
"""For each partition: its leader, and the brokers that are in sync with it."""


class CutCluster(Cluster):
    """A cluster that clients also reach through `proxies`, one for each node: whoever begins at `cut_bootstrap`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, nodes=NODES)
        self._ports = _free_ports([], NODES)
        self.proxies = [Proxy(port) for port in self._ports]

    @property
    def cut_bootstrap(self) -> str:
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies)

    def state(self, prefix: str) -> State | None:
        """The partitions of a log; None if no broker tells."""
        try:
            found = self.admin().list_topics(timeout=_ASK_S).topics
        except KafkaException:
            return None
        return {
            (name, number): (partition.leader, partition.isrs)
            for name, topic in found.items()
            if name.startswith(f"{prefix}.")
            for number, partition in topic.partitions.items()
        }

    def _configure(self, node: int) -> Path:
        path = super()._configure(node)
        settings = dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines())
        settings["listeners"] += f",CUT://127.0.0.1:{self._ports[node - 1]}"
        settings["advertised.listeners"] += f",CUT://127.0.0.1:{self.proxies[node - 1].port}"
        settings["listener.security.protocol.map"] += ",CUT:PLAINTEXT"
        path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
        return path

"""A sidecar in this process, on a port of its own, with the official client of what it serves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from typing import Any

import httpx
import openai
from fedloop_clients import Agent
from fedloop_clients.sidecar.answering import Answering, OwnModel
from fedloop_clients.sidecar.app import create_app
from fedloop_clients.sidecar.serving import SidecarServer, listen

KEY = "fedloop-key-of-the-tests"


class Served:
    """A sidecar that answers at `base_url`."""

    def __init__(self, agent: Agent, answering: Answering, origins: Collection[str]) -> None:
        self.agent, self.answering = agent, answering
        self.listening = listen(0)
        self.address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.base_url = f"{self.address}/v1"
        self._ready = threading.Event()
        app = create_app(agent, answering, KEY, origins=origins)
        self.server = SidecarServer(app, self.listening, self._listens)
        self.thread = threading.Thread(target=self.server.serve_here, daemon=True)
        self.thread.start()
        assert self._ready.wait(30)
        self.openai = openai.OpenAI(base_url=self.base_url, api_key=KEY, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.address, headers={"authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60)

    def _listens(self, address: str) -> None:
        self.agent.links.serve_at(address)
        self._ready.set()

    def feedback(self, response_id: str, **given: Any) -> httpx.Response:
        return self.http.post("/v1/feedback", json={"id": response_id, **given})

    def close(self) -> None:
        self.openai.close()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        self.listening.close()
        self.answering.close()


@contextlib.contextmanager
def serving(agent: Agent, answering: Answering | None = None, origins: Collection[str] = ()) -> Iterator[Served]:
    served = Served(agent, answering or OwnModel(agent), origins)
    try:
        yield served
    finally:
        served.close()


def error(response: httpx.Response) -> dict[str, Any]:
    """What an error says, in OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = document["error"]
    assert found["message"]
    assert found["message"].count("\n") == 0
    return found

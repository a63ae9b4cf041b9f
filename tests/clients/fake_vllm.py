"""A fake upstream that takes adapters as vLLM does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from clients.fake_upstream import ANSWER, FakeUpstream, document


class FakeVllm:
    """As much of vLLM as handing over needs: it knows its base and the adapters that it was told to load, and refuses others."""

    def __init__(self, fake: FakeUpstream) -> None:
        self.fake, self.adapters = fake, dict[str, str]()
        self.refuses: bytes | None = None
        """What it answers to all that is about adapters."""
        fake.answer = self.answer

    async def answer(self, writer: asyncio.StreamWriter) -> None:
        line, _, body = self.fake.requests[-1]
        writer.write(self._answer(line.split()[1], body))
        await writer.drain()

    def _answer(self, path: str, body: Any) -> bytes:
        if path == "/v1/models":
            return document("200 OK", {"data": [{"id": "base"}, *({"id": name} for name in self.adapters)]})
        if path == "/v1/chat/completions":
            known = body["model"] in ("base", *self.adapters)
            return ANSWER if known else document("404 Not Found", {"error": {"message": "no such model"}})
        if self.refuses is not None:
            return self.refuses
        name = body["lora_name"]
        if path == "/v1/load_lora_adapter" and name not in self.adapters:
            assert (Path(body["lora_path"]) / "adapter_config.json").is_file()
            self.adapters[name] = body["lora_path"]
        elif path == "/v1/unload_lora_adapter" and name in self.adapters:
            del self.adapters[name]
        else:
            return document("400 Bad Request", {"error": {"message": f"not with {name}"}})
        return document("200 OK", b"Success")

    def told(self, what: str) -> list[str]:
        """The adapters that it was told to load or unload."""
        return [body["lora_name"] for line, _, body in self.fake.requests if f"/v1/{what}_lora_adapter" in line]

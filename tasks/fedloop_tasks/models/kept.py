"""What a frozen part gives of each text: batched, padded, and kept within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedloop_tasks.models.on_disk import DiskStates


class KeptStates:
    """The states of the texts used last, within a bound on their bytes in memory; what has no room there goes to `beyond`."""

    def __init__(self, most_bytes: int, beyond: DiskStates | None = None) -> None:
        self._most, self._beyond = most_bytes, beyond
        self.size_bytes = 0
        """In memory."""
        self._states: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, text: Hashable) -> Tensor | None:
        if text in self._states:
            self._states.move_to_end(text)
        elif self._beyond is not None and (found := self._beyond.get(text)) is not None:
            self.put(text, found)
            return found
        return self._states.get(text)

    def put(self, text: Hashable, states: Tensor) -> None:
        """Keeps the states of a text that has none."""
        self._states[text] = states
        self.size_bytes += states.nbytes
        while self.size_bytes > self._most:
            oldest, given = self._states.popitem(last=False)
            self.size_bytes -= given.nbytes
            if self._beyond is not None:
                self._beyond.put(oldest, given)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in order of length, cut so that a padded batch holds at most `most_tokens` (or one example)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mask [B, T] and the rows padded with zeros to the longest."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return mask, nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

"""At which rank a device trains the adapters of a round: by its memory and by what its owner allows, by nothing else.

What there is to learn from never counts: the size of an update would tell of it.
"""

from __future__ import annotations

from fedloop_events.errors import FedloopError
from fedloop_events.types import RoundOpened
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Arrays, Model


class RankTooHighError(FedloopError):
    """The round trains adapters of a higher rank than the device's owner allows, and no part of them alone."""


def rank_for(model: Model, opened: RoundOpened, base: Arrays, most: int | None) -> int:
    """The rank at which a device trains a round whose base has the tensors `base`: the model's own, or a smaller one where the
    program can merge that and there is memory for no more, or `most` is less.

    Raises `TooLittleMemoryError` and `RankTooHighError`.
    """
    whole, program = model.spec.rank, program_of(opened.strategy)
    if program.kind != "train":
        model.check_memory()
        return whole
    release_bytes = sum(values.nbytes for values in base.values())
    allowed = min(whole, most or whole)
    if program.smaller(opened, base):
        return model.fitting_rank(allowed, release_bytes)
    if allowed < whole:
        raise RankTooHighError(f"a round of {opened.strategy} trains adapters of rank {whole} whole, {allowed} is allowed")
    model.check_memory(release_bytes)
    return whole

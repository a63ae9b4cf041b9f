"""The device's Flower `ClientApp`: a round's terms and base release in, the program's tensors out.

It answers "train" messages only, and under differential privacy its reply tells nothing but the tensors: no loss, no count, no
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fedloop_events.errors import TensorError
from fedloop_events.flower.messages import terms_of
from fedloop_events.types import RoundOpened
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Arrays, Model, TermsError
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

ARRAYS = "arrays"
METRICS = "metrics"


def client_app(get_model: Callable[[RoundOpened], Model], get_examples: Callable[[RoundOpened], Sequence[Any]]) -> ClientApp:
    """An app that runs the round's program on `get_model(opened)` and `get_examples(opened)`; the round's terms come in the
    message's record `TERMS`.

    The message's record `ARRAYS` is the base release. The reply holds `ARRAYS` (exactly `opened.upload`, float32) and in
    `METRICS` "num-examples": 1 under a mechanism, where every client weighs the same and counts are private, else their number.
    The model is handed back with the tensors it had. What cannot be done is raised, as Flower expects it.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train_round(message: Message, context: Context) -> Message:
        opened = terms_of(message)
        if opened is None:
            raise TermsError("the message has no terms of a round", hint="serve this app through the agent")
        model, examples = get_model(opened), get_examples(opened)
        before = model.arrays()
        try:
            model.load(_arrays(message.content))
            trained = program_of(opened.strategy).compute(model, examples, opened)
        finally:
            model.load(before)
        weight = 1 if opened.mechanism is not None else len(examples)
        return Message(_content(trained, weight), reply_to=message)

    return app


def _arrays(content: RecordDict) -> Arrays:
    record = content.array_records.get(ARRAYS)
    if record is None:
        raise TensorError(f"the message has no array record {ARRAYS!r} with the base release")
    return {name: array.numpy() for name, array in record.items()}


def _content(arrays: Arrays, weight: int) -> RecordDict:
    record = ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in arrays.items()})
    return RecordDict({ARRAYS: record, METRICS: MetricRecord({"num-examples": weight})})

"""The default app: the deployment's text classifier, trained on what this device's users said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedloop_events import types
from fedloop_events.flower.messages import ClientAppCallable
from flwr.app import Context, Message

from fedloop_clients.examples import Examples
from fedloop_clients.models import Models

if TYPE_CHECKING:
    from fedloop_clients.model import EmbeddingClassifier


class ClassifierApp:
    """Serves rounds of `model` from the examples in the store. A device without examples declines, before it spends anything.

    `spec` gives the model's spec, or None while the log names none. What it trains with (torch and its kin) is imported when the
    first round comes.
    """

    def __init__(
        self, model: str, examples: Examples, models: Models, spec: Callable[[], types.ModelSpec | None], *, min_examples: int
    ) -> None:
        self._model, self._examples, self._models, self._spec, self._min_examples = model, examples, models, spec, min_examples
        self._borrowed: EmbeddingClassifier | None = None

    def unready(self, opened: types.RoundOpened | None) -> str | None:
        """See `answering.App`."""
        spec = self._spec()
        if opened is None or opened.model != self._model or spec is None:
            return "other-model"
        if self._examples.count(spec.labels) < self._min_examples:
            return "no-examples"
        from fedloop_clients.encoder import ModelError

        try:
            with self._models.borrowed(spec):
                return None
        except ModelError:
            return "no-model"

    def __call__(self, message: Message, context: Context) -> Message:
        from fedloop_clients.app import client_app

        spec = self._spec()
        assert spec is not None
        with self._models.borrowed(spec) as held:
            self._borrowed = held.model
            try:
                answer: Message = client_app(self._get_model, self._get_examples)(message, context)
                return answer
            finally:
                self._borrowed = None

    def _get_model(self, opened: types.RoundOpened) -> EmbeddingClassifier:
        assert self._borrowed is not None
        return self._borrowed

    def _get_examples(self, opened: types.RoundOpened) -> tuple[list[str], list[str]]:
        spec = self._spec()
        assert spec is not None
        examples = self._examples.read(spec.labels)
        return [text for text, _ in examples], [label for _, label in examples]


class PlainApp:
    """Any Flower `ClientApp`: whether there is data for it is the app's own business."""

    def __init__(self, app: ClientAppCallable) -> None:
        self._app = app

    def unready(self, opened: types.RoundOpened | None) -> str | None:
        """See `answering.App`."""
        return None

    def __call__(self, message: Message, context: Context) -> Message:
        return self._app(message, context)

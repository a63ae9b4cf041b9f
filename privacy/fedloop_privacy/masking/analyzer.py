"""Presidio behind one door: its recognisers and context words, on a model that is on this machine or on none.

Read in presidio-analyzer 2.2.366. Three of its habits are undone here: it downloads a model that is not installed; a pattern that
times out is skipped, which lets personal data through; and its e-mail recogniser asks the network for a list of domains.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import phonenumbers
import regex
import spacy
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, RecognizerResult, pattern_recognizer
from presidio_analyzer.nlp_engine import NlpArtifacts, NlpEngine, SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import PhoneRecognizer
from spacy.language import Language
from spacy.tokens import Doc

from fedloop_privacy.masking.errors import MaskingError
from fedloop_privacy.masking.spans import Span

# Below this, Presidio itself calls a pattern weak: any nine digits could be a passport. A context word lifts it above.
MIN_SCORE = 0.3
# The first needs seconds for 10 KB of "a.a.a" and the second goes to the network: patterns of ours stand for them. The third is
# sped up below.
_REPLACED = ("UrlRecognizer", "EmailRecognizer", "PhoneRecognizer")
_BATCH_SIZE = 64
# Without a trained model nothing of Presidio's matches a text without digits, or pairs of hexadecimal ones between separators.
_COULD_MATCH = regex.compile(r"\d|[0-9A-Fa-f]{2}[:.-][0-9A-Fa-f]{2}|::")
_PHONE_LIKE = regex.compile(r"(?<![\d])[+(]{0,2}\d(?:[ ().\-/\n]{0,3}\d){4,15}+(?!\d)(?:[ ]?(?:x|ext\.?)[ ]?\d{1,6})?")
# The tokeniser of spaCy takes time quadratic in a run of punctuation.
_PUNCTUATION_RUN = regex.compile(r"[^\w\s]{16,}+")
# Presidio logs texts that it fails to validate, and every recogniser of another language.
logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL + 1)
_TYPE_CHARS = regex.compile(r"[^A-Z0-9]+")


@Language.component("fedloop_lower_lemma")
def _lower_lemma(doc: Doc) -> Doc:
    # Presidio looks for its context words among the lemmas, which a blank pipeline leaves empty.
    for token in doc:
        token.lemma_ = token.lower_
    return doc


def blank_engine() -> NlpEngine:
    """An English engine that only splits words: nothing is trained, nothing is downloaded."""
    pipeline = spacy.blank("en")
    pipeline.add_pipe("fedloop_lower_lemma")
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "blank"}])
    engine.nlp = {"en": pipeline}  # type: ignore[assignment]
    return engine


def engine_from_config(config: dict[str, Any]) -> NlpEngine:
    """The spaCy engine that a settings file names, in the form of Presidio's `NlpEngineProvider`.

    Raises `MaskingError` for another engine's name and for a model that is not installed.
    """
    name, models = config.get("nlp_engine_name"), config.get("models")
    if name != "spacy" or not isinstance(models, list) or not models or not all(isinstance(m, dict) for m in models):
        raise MaskingError(
            f"the NLP engine {name!r} cannot be built from settings",
            hint='name "spacy" and a list of models, or build and load another engine and pass it as nlp_engine',
        )
    engine = SpacyNlpEngine(models=models)
    _load(engine)
    return engine


def _load(engine: NlpEngine) -> None:
    if not isinstance(engine, SpacyNlpEngine):
        raise MaskingError(
            f"the NLP engine {type(engine).__name__} is not loaded", hint="call its load() first: no model is downloaded here"
        )
    for model in engine.models:
        name = model.get("model_name")
        if not isinstance(name, str) or "lang_code" not in model:
            raise MaskingError("a model in the settings lacks its lang_code or model_name")
        if not spacy.util.is_package(name) and not Path(name).exists():
            raise MaskingError(
                f"the spaCy model {name!r} is not installed", hint=f"python -m spacy download {name}, or leave the setting out"
            )
    engine.load()


class _PhoneRecognizer(PhoneRecognizer):
    """Presidio's, on the stretches of a text that could be a number and only until a region knows it: eight times as fast."""

    def analyze(self, text: str, entities: list[str], nlp_artifacts: NlpArtifacts | None = None) -> list[RecognizerResult]:
        results = []
        for stretch in _PHONE_LIKE.finditer(text):
            start, end = stretch.span()
            for region in self.supported_regions:
                for match in phonenumbers.PhoneNumberMatcher(stretch[0], region, leniency=1):
                    match.start, match.end = start + match.start, start + match.end
                    results.append(self._get_recognizer_result(match, text, region, nlp_artifacts))  # type: ignore[no-untyped-call]
                if results and results[-1].end == end:
                    break
        return results


class Analyzer:
    """Presidio's recognisers over one engine. `types` are the entity names that they can give."""

    def __init__(self, engine: NlpEngine | None, deadline_s: float) -> None:
        if deadline_s >= pattern_recognizer.REGEX_TIMEOUT_SECONDS:
            raise MaskingError(
                f"REGEX_TIMEOUT_SECONDS ({pattern_recognizer.REGEX_TIMEOUT_SECONDS}) is not above the deadline of {deadline_s} s",
                hint="Presidio would skip a slow pattern before the deadline is noticed: raise the one or lower the other",
            )
        self._trained = engine is not None
        self._engine = blank_engine() if engine is None else engine
        if not self._engine.is_loaded():
            _load(self._engine)
        languages = list(self._engine.get_supported_languages())
        self._language = "en" if "en" in languages else languages[0]
        registry = RecognizerRegistry(supported_languages=[self._language])
        registry.load_predefined_recognizers(languages=[self._language], nlp_engine=self._engine)
        for name in _REPLACED:
            with contextlib.suppress(ValueError):
                registry.remove_recognizer(name, language=self._language)
        registry.add_recognizer(_PhoneRecognizer(supported_language=self._language))
        self._presidio = AnalyzerEngine(
            registry=registry,
            nlp_engine=self._engine,
            supported_languages=[self._language],
            default_score_threshold=MIN_SCORE,
        )
        self.types = frozenset(map(_type_name, self._presidio.get_supported_entities(self._language)))

    def find(self, text: str, until: float, artifacts: NlpArtifacts | None = None) -> list[Span]:
        """The spans in a folded text; `artifacts` are the engine's for it, where they are already made.

        Raises `MaskingError` for a span outside the text, and `TimeoutError` when the monotonic clock has passed `until`.
        """
        if not self._trained and not _COULD_MATCH.search(text):
            return []
        calm = _calm(text)
        results = self._presidio.analyze(calm, language=self._language, nlp_artifacts=artifacts)
        if monotonic() > until:
            raise TimeoutError
        return [self._checked(len(text), r.start, r.end, r.entity_type, r.score) for r in results]

    def artifacts(self, texts: Sequence[str], deadline_s: float) -> Iterator[NlpArtifacts | None]:
        """The engine's artifacts for each folded text, made in batches where a trained model gains by it.

        Raises `TimeoutError` when a batch takes longer than its texts may take together.
        """
        for at in range(0, len(texts), _BATCH_SIZE):
            batch = texts[at : at + _BATCH_SIZE]
            if not self._trained or len(batch) == 1:
                yield from [None] * len(batch)
                continue
            until = monotonic() + deadline_s * len(batch)
            made = list(self._engine.process_batch(map(_calm, batch), language=self._language, batch_size=_BATCH_SIZE))
            if monotonic() > until or len(made) != len(batch):
                raise TimeoutError
            yield from (artifacts for _, artifacts in made)

    @staticmethod
    def _checked(length: int, start: object, end: object, kind: object, score: object) -> Span:
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= length):
            raise MaskingError("a recogniser gave offsets outside the text", hint="the recogniser or its model is broken")
        return Span(start, end, _type_name(str(kind)), float(score) if isinstance(score, (int, float)) else MIN_SCORE)


def _calm(text: str) -> str:
    return str(_PUNCTUATION_RUN.sub(lambda run: " " * len(run[0]), text))


def _type_name(label: str) -> str:
    return _TYPE_CHARS.sub("_", label.upper()).strip("_")[:38] or "PII"

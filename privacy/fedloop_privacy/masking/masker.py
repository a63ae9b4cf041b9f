"""The masker: text in, text without personal values out, or an error. Nothing in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import regex
from fedloop_events.masked import MaskedText

from fedloop_privacy.masking import gazetteer, patterns
from fedloop_privacy.masking.analyzer import Analyzer, engine_from_config
from fedloop_privacy.masking.errors import MaskingError
from fedloop_privacy.masking.names import NameFinder
from fedloop_privacy.masking.normalise import View, encoded_stretches, fold, mixed_script_words, unescape
from fedloop_privacy.masking.spans import PLACEHOLDER, Span, outside, union

if TYPE_CHECKING:
    from presidio_analyzer.nlp_engine import NlpArtifacts, NlpEngine

ENCODED, MIXED_SCRIPT = "ENCODED_TEXT", "MIXED_SCRIPT"
_OWN_TYPES = frozenset({ENCODED, MIXED_SCRIPT, "PERSON", "LOCATION", "NRP", "CREDIT_CARD", *(p.type for p in patterns.ALL)})
# A mask changes what stands beside it, so what is left is read again until nothing more is found. Two rounds are the rule.
_MAX_ROUNDS = 6


class Masker:
    """Replaces personal values by typed placeholders that are numbered within one text: `<PERSON_1>`.

    Within one text, and within texts that are masked together, the same value gets the same placeholder; no mapping is kept.
    Masking a masked text changes nothing. A placeholder that the text already holds stays as it is. What is masked, and what is
    missed, is measured in `benchmarks/masking.py`: masking lowers a risk, it removes none.
    """

    def __init__(self, nlp_engine: NlpEngine | None = None, *, max_chars: int = 10_000, deadline_s: float = 5.0) -> None:
        """`nlp_engine` is any Presidio engine with a model that is installed; without one, patterns and lists do the work.

        Raises `MaskingError` when it cannot be built.
        """
        failure = ""
        try:
            self._analyzer = Analyzer(nlp_engine, deadline_s)
            self._names = NameFinder(gazetteer.load())
        except MaskingError:
            raise
        except Exception as error:
            failure = type(error).__name__
        if failure:
            raise MaskingError("the masker cannot be built", cause=failure, hint="check the NLP engine and its model")
        self._types = self._analyzer.types | _OWN_TYPES
        self._max_chars = max_chars
        self._deadline_s = deadline_s

    @classmethod
    def from_config(cls, config: dict[str, Any], *, max_chars: int = 10_000, deadline_s: float = 5.0) -> Masker:
        """From a settings file: `{"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": "..."}]}`.

        Raises `MaskingError` when the model is not installed; nothing is downloaded.
        """
        return cls(engine_from_config(config), max_chars=max_chars, deadline_s=deadline_s)

    def mask(self, text: str) -> MaskedText:
        """The text with every value that was found replaced, and how many of each type.

        Raises `MaskingError` whatever goes wrong: no text leaves here half masked.
        """
        return self._mask(text, self.find(text))

    def mask_many(self, texts: Sequence[str]) -> list[MaskedText]:
        """`mask` of each text, faster where a trained model takes them together. Raises as `mask` does, for the first failure."""
        for text in texts:
            self._check(text)
        failure = ""
        out: list[MaskedText] = []
        try:
            folded = [fold(View.of(text)).text for text in texts]
            for text, artifacts in zip(texts, self._analyzer.artifacts(folded, self._deadline_s), strict=True):
                out.append(self._mask(text, self._settled(text, artifacts)))
        except MaskingError:
            raise
        except Exception as error:
            failure = _named(error)
        if failure:
            raise _failed(failure)
        return out

    def mask_together(self, texts: Sequence[str]) -> list[MaskedText]:
        """`mask` of each of the texts of one conversation: the same value gets the same placeholder in all of them, and another
        value never one that any of them holds already. Raises as `mask` does, for the first failure."""
        spans = [self.find(text) for text in texts]
        used, numbers = self._used(texts), dict[tuple[str, str], int]()
        return [self._mask(text, found, used, numbers) for text, found in zip(texts, spans, strict=True)]

    def find(self, text: str) -> list[Span]:
        """What `mask` would replace: sorted spans of the text, apart from each other. Raises as `mask` does."""
        self._check(text)
        return self._settled(text, None)

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise MaskingError(f"only text can be masked, not {type(text).__name__}")
        if len(text) > self._max_chars:
            raise MaskingError(
                f"a text of {len(text)} characters is over the limit of {self._max_chars}", hint="split or shorten it"
            )
        if any("\ud800" <= char <= "\udfff" for char in text) if not text.isascii() else False:
            raise MaskingError("the text is not valid Unicode: it holds a lone surrogate")

    def _settled(self, text: str, artifacts: NlpArtifacts | None) -> list[Span]:
        failure = ""
        try:
            return self._rounds(text, artifacts)
        except MaskingError:
            raise
        except Exception as error:
            failure = _named(error)
        # Outside the handler, so that the error carries no context: another's message could hold the text.
        raise _failed(failure)

    def _rounds(self, text: str, artifacts: NlpArtifacts | None) -> list[Span]:
        until = monotonic() + self._deadline_s
        kept = [match.span() for match in self._placeholders(text)]
        spans: list[Span] = []
        for _ in range(_MAX_ROUNDS):
            view = self._replaced(text, spans, self._used([text]), {}) if spans else View.of(text)
            protected = sorted([*kept, *((s.start, s.end) for s in spans)])
            new = [s for s in outside(self._read(view, until, artifacts), protected) if _tells(text[s.start : s.end])]
            if not new:
                return spans
            spans = union([*spans, *_trimmed(text, new)])
            artifacts = None
        raise MaskingError(f"what is left of the text still looks personal after {_MAX_ROUNDS} rounds")

    def _read(self, view: View, until: float, artifacts: NlpArtifacts | None) -> list[Span]:
        """What one look at every reading of a view finds, in offsets of the original."""
        found = [_from(view, Span(*at, MIXED_SCRIPT, 0.4)) for at in mixed_script_words(view.text)]
        view = self._blinded(view)
        for reading in filter(None, (view, unescape(view))):
            folded = fold(reading)
            spans = [
                *self._analyzer.find(folded.text, until, artifacts),
                *patterns.find(folded.text, until),
                *self._names.find(folded.text),
                *(Span(*at, ENCODED, 0.9) for at in encoded_stretches(folded.text)),
            ]
            found += [_from(folded, span) for span in spans]
            artifacts = None
            if monotonic() > until:
                raise TimeoutError
        return found

    def _blinded(self, view: View) -> View:
        """The view with nothing to read in its placeholders, so that neither their words nor their numbers are found."""
        return View(_sub_same_length(self._placeholders(view.text), view.text), view.starts, view.ends)

    def _placeholders(self, text: str) -> list[regex.Match[str]]:
        return [m for m in PLACEHOLDER.finditer(text) if m["type"] in self._types] if "<" in text else []

    def _used(self, texts: Sequence[str]) -> Counter[str]:
        """The highest number of each type among the placeholders that the texts hold already."""
        used = Counter[str]()
        for match in (each for text in texts for each in self._placeholders(text)):
            used[match["type"]] = max(used[match["type"]], int(match["number"]))
        return used

    def _replaced(self, text: str, spans: list[Span], used: Counter[str], numbers: dict[tuple[str, str], int]) -> View:
        """The text with a placeholder for each span: the number that its value has, or the next one that is not used."""
        pieces = []
        for span in spans:
            value = "".join(filter(str.isalnum, fold(View.of(text[span.start : span.end])).text)).casefold()
            if (span.type, value) not in numbers:
                used[span.type] += 1
                numbers[span.type, value] = used[span.type]
            pieces.append((span.start, span.end, f"<{span.type}_{numbers[span.type, value]}>"))
        return View.of(text).rewritten(pieces)

    def _mask(
        self, text: str, spans: list[Span], used: Counter[str] | None = None, numbers: dict[tuple[str, str], int] | None = None
    ) -> MaskedText:
        failure = ""
        try:
            used, numbers = self._used([text]) if used is None else used, {} if numbers is None else numbers
            masked = self._replaced(text, spans, used, numbers).text if spans else text
            return MaskedText._from_masker(masked, dict(Counter(span.type for span in spans)))
        except Exception as error:
            failure = _named(error)
        raise _failed(failure)


def _sub_same_length(matches: list[regex.Match[str]], text: str) -> str:
    parts, at = [], 0
    for match in matches:
        parts += [text[at : match.start()], "<", "~" * (len(match[0]) - 2), ">"]
        at = match.end()
    return "".join([*parts, text[at:]])


def _from(view: View, span: Span) -> Span:
    start, end = view.origin(span.start, span.end)
    return span._replace(start=start, end=end)


def _tells(value: str) -> bool:
    return any(map(str.isalnum, value))


def _trimmed(text: str, spans: list[Span]) -> list[Span]:
    out = []
    for span in spans:
        value = text[span.start : span.end]
        lead = len(value) - len(value.lstrip())
        out.append(span._replace(start=span.start + lead, end=span.start + len(value.rstrip())))
    return out


def _named(error: Exception) -> str:
    return "the deadline passed" if isinstance(error, TimeoutError) else type(error).__name__


def _failed(cause: str) -> MaskingError:
    return MaskingError("the text could not be masked, so nothing of it is used", cause=cause)

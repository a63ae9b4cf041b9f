"""What the masker finds and what it leaves: `python -m benchmarks masking`.

On presidio-research's synthetic texts, against Presidio's default recognisers on a blank model: recall (at least nine tenths of
the letters and digits of a planted value are masked, whatever the type), the share of planted letters and digits that leak,
precision (at least half of a mask lies on planted values), and texts per second. Then the share of words masked in banking77's
questions, which hold next to nothing personal, and 24 ways to write a personal value so that a pattern misses it.
"""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fedloop_privacy.masking import Masker

from benchmarks.harness import MIN_RUNS, Row, counted, data_set, per_second, rates, timed_in_turn

Found = list[tuple[int, int, str]]
Finder = Callable[[str], Found]

_ADDRESS = "john.smith@example.com"
_BASE64 = base64.b64encode(_ADDRESS.encode()).decode()
# Each: how it is hidden, the text, and what must not be left of it.
ATTACKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("zero-width characters in a card", "card 4111\u200b1111\u200b1111\u200b1111 ok", ("4111", "1111")),
    ("zero-width characters in an e-mail", "mail jo\u200bhn.smith@exam\u200bple.com", ("hn", "ple")),
    ("spaced digits", "my card is 4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", ("4 1", "1 1")),
    ("digits over two lines", "4111 1111\n1111 1111", ("1111",)),
    ("full-width digits", "card \uff14" + "\uff11" * 15, ("\uff14", "\uff11")),
    ("Arabic-Indic digits", "card \u0664" + "\u0661" * 15, ("\u0664", "\u0661")),
    ("spelled-out digits", "card four one one one two two two two three three three three", ("four", "two", "three")),
    ("at and dot as words", "write to john at example dot com", ("john", "example")),
    ("at and dot in brackets", "john.smith[at]example(dot)com", ("john", "smith", "example")),
    ("lower case", "i spoke to john smith yesterday", ("john", "smith")),
    ("capitals", "I SPOKE TO JOHN SMITH YESTERDAY", ("JOHN", "SMITH")),
    ("alternating case", "my name is jOhN sMiTh", ("jOhN", "sMiTh")),
    ("mathematical letters", "I am \U0001d409\U0001d428\U0001d421\U0001d427 Smith",
     ("\U0001d409", "Smith")),
    ("German", "Ich hei\u00dfe J\u00fcrgen M\u00fcller, Hauptstra\u00dfe 12, 10115 Berlin",
     ("J\u00fcrgen", "ller", "12", "10115", "Berlin")),
    ("Russian", "\u041c\u0435\u043d\u044f \u0437\u043e\u0432\u0443\u0442 \u0418\u0432\u0430\u043d",
     ("\u0418\u0432\u0430\u043d",)),
    ("Chinese", "\u6211\u53eb\u738b\u5c0f\u660e, 13812345678", ("\u738b", "\u5c0f\u660e", "138")),
    ("SSN with dots", "it is 123.45.6789", ("123", "6789")),
    ("SSN with en dashes", "it is 123\u201345\u20136789", ("123", "6789")),
    ("glued to words", "myssnis123456789andmailis" + _ADDRESS, ("123456789", "john")),
    ("base64", f"contact {_BASE64}", (_BASE64[:8],)),
    ("leet", "my name is j0hn sm1th", ("j0hn", "sm1th")),
    ("percent-encoded", "?q=john.smith%40example.com and john%2540example.com", ("john", "smith")),
    ("HTML entities", "john.smith&#64;example&period;com", ("john", "example")),
    ("a Cyrillic letter in a Latin name", "J\u043ehn Smith wrote", ("hn", "Smith")),
)  # fmt: skip


@dataclass
class Score:
    """Counts over texts with planted values, by type."""

    planted: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    chars: int = 0
    leaked: int = 0

    def add(self, text: str, values: Found, masks: Found) -> None:
        """Counts one text. A value is caught when nine tenths of its letters and digits are masked."""
        masked, planted = _covered(text, masks), _covered(text, values)
        for start, end, kind in values:
            tell = [at for at in range(start, end) if text[at].isalnum()]
            seen = sum(at in masked for at in tell)
            self.chars += len(tell)
            self.leaked += len(tell) - seen
            self.planted[kind] += 1
            self.caught[kind] += bool(tell) and seen >= 0.9 * len(tell)
        for start, end, kind in masks:
            tell = [at for at in range(start, end) if text[at].isalnum()]
            self.masks[kind] += 1
            self.right[kind] += 2 * sum(at in planted for at in tell) >= len(tell)

    @property
    def recall(self) -> float:
        return self.caught.total() / max(1, self.planted.total())

    @property
    def leak(self) -> float:
        return self.leaked / max(1, self.chars)

    @property
    def precision(self) -> float:
        return self.right.total() / max(1, self.masks.total())


def _covered(text: str, spans: Found) -> set[int]:
    return {at for start, end, _ in spans for at in range(start, end) if text[at].isalnum()}


def presidio_alone() -> Finder:
    """The peer: Presidio's default recognisers and a pipeline without a trained model, kept off the network."""
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())  # type: ignore[assignment]
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "blank"}])
    engine.nlp = {"en": spacy.blank("en")}  # type: ignore[assignment]
    analyzer = AnalyzerEngine(nlp_engine=engine)
    return lambda text: [(r.start, r.end, r.entity_type) for r in analyzer.analyze(text, "en")]


def scored(finder: Finder, documents: Iterable[dict[str, Any]]) -> Score:
    """What a finder reaches on presidio-research's documents."""
    score = Score()
    for document in documents:
        values = [(span["start_position"], span["end_position"], span["entity_type"]) for span in document["spans"]]
        score.add(document["full_text"], values, finder(document["full_text"]))
    return score


def leaks(masker: Masker) -> list[str]:
    """The attacks of which something is left."""
    out = []
    for name, text, tells in ATTACKS:
        masked = masker.mask(text).text
        out += [name] if any(tell in masked for tell in tells) else []
    return out


def share_masked(masker: Masker, texts: Iterable[str]) -> tuple[float, Counter[str]]:
    """The share of words under a mask, and the words."""
    words, masked = 0, Counter[str]()
    for text in texts:
        words += len(text.split())
        masked.update(word for span in masker.find(text) for word in text[span.start : span.end].split())
    return masked.total() / max(1, words), masked


def rows(quick: bool) -> list[Row]:
    """Prints the tables by type, and returns the comparison; on a twentieth of the texts when quick."""
    part, runs = (0.05, 1) if quick else (1.0, MIN_RUNS)
    documents = json.loads(data_set("pii/synth_dataset_v2.json").read_text("utf-8"))
    with data_set("banking77/test.csv").open(encoding="utf-8", newline="") as file:
        questions = [row["text"] for row in csv.DictReader(file)]
    documents, questions = documents[: int(part * len(documents))], questions[: int(part * len(questions))]
    masker, peer = Masker(), presidio_alone()
    ours, theirs = scored(lambda text: [(s.start, s.end, s.type) for s in masker.find(text)], documents), scored(peer, documents)
    print(f"{'planted type':<18}{'values':>8}{'recall':>9}{'peer':>7}")
    for kind, count in ours.planted.most_common():
        print(f"{kind:<18}{count:>8}{ours.caught[kind] / count:>9.2f}{theirs.caught[kind] / count:>7.2f}")
    print(f"\n{'mask':<18}{'masks':>8}{'precision':>11}")
    for kind, count in ours.masks.most_common():
        print(f"{kind:<18}{count:>8}{ours.right[kind] / count:>11.2f}")
    print(f"\nchar leak {ours.leak:.3f}, peer {theirs.leak:.3f}; precision {ours.precision:.3f}, peer {theirs.precision:.3f}")
    share, words = share_masked(masker, questions)
    print(f"banking77: {share:.2%} of the words masked: {', '.join(f'{word} {n}' for word, n in words.most_common(12))}")
    left = leaks(masker)
    print(f"attacks: {len(left)} of {len(ATTACKS)} leak{': ' + ', '.join(left) if left else ''}\n")
    texts = [document["full_text"] for document in documents[:300]]
    times = timed_in_turn(lambda: [masker.find(t) for t in texts], lambda: [peer(t) for t in texts], runs=runs)
    what = "Presidio's defaults, blank model"
    return [
        counted("personal values masked", what, ours.recall, max(theirs.recall, 1e-9), "of all", 2.0),
        counted("masks on a personal value", "the bound", ours.precision, 0.9, "of all", 1.0),
        rates("finding, texts with personal values", what, per_second(len(texts), times), "texts/s"),
    ]

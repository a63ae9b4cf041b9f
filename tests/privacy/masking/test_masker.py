"""The masker's promises: everything found is gone, nothing else is touched, and a failure gives nothing at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fedloop_events.masked import MaskedText
from fedloop_privacy.masking import Masker, MaskingError, Span, patterns
from fedloop_privacy.masking import masker as masker_module
from hypothesis import example, given, settings
from hypothesis import strategies as st
from presidio_analyzer import AnalyzerEngine, RecognizerResult, pattern_recognizer

ROOT = Path(__file__).resolve().parents[3]
SECRET = "Wilhelmina Quackenbush"
TEXT = f"My name is {SECRET}, call +44 20 7946 0958 or write to w.q@example.com."

FRAGMENTS = (
    "my name is John Smith", "jane doe", "4111 1111 1111 1111", "john@example.com", "john at example dot com", "+44 20 7946 0958",
    "123-45-6789", "24 Clarke Avenue, Suite 279", "London", "5 May 1980", "I am 45", "GB82 WEST 1234 5698 7654 32", "<PERSON_1>",
    "<EMAIL_ADDRESS_2>", "<NOT_A_TYPE_1>", "john%40example.com", "J\u043ehn", "\u200b", "\u00ad", "e\u0301",
    " ", "\n", ".", ", ", "-", "<", ">", "_1>", "Will",
    "Mr", "may", "1", "a", "A", "\uff11", "\ufb01", "\u4e2d\u5c0f\u660e", "the card", "192.168.0.1",
)  # fmt: skip
texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=8).map("".join))


def _replaced(text: str, spans: list[Span]) -> Iterator[str]:
    at = 0
    for span in spans:
        yield text[at : span.start]
        at = span.end
    yield text[at:]


def test_values_become_typed_placeholders_and_are_counted(masker: Masker) -> None:
    masked = masker.mask(TEXT)
    assert masked.text == "My name is <PERSON_1>, call <PHONE_NUMBER_1> or write to <EMAIL_ADDRESS_1>."
    assert masked.counts == {"PERSON": 1, "PHONE_NUMBER": 1, "EMAIL_ADDRESS": 1}


def test_one_value_has_one_placeholder_and_another_value_another(masker: Masker) -> None:
    masked = masker.mask("John Smith wrote to Jane Doe. JOHN SMITH and J\u00f3hn Smith wrote again, Jane Doe did not.")
    assert masked.text == "<PERSON_1> wrote to <PERSON_2>. <PERSON_1> and <PERSON_1> wrote again, <PERSON_2> did not."
    assert masked.counts == {"PERSON": 5}


def test_a_placeholder_that_the_text_holds_stays_and_its_number_is_not_given_again(masker: Masker) -> None:
    masked = masker.mask("<PERSON_1> told John Smith about <EMAIL_ADDRESS_7>")
    assert masked.text == "<PERSON_1> told <PERSON_2> about <EMAIL_ADDRESS_7>"
    assert masked.counts == {"PERSON": 1}


def test_only_our_own_placeholders_are_spared(masker: Masker) -> None:
    assert "smith" not in masker.mask("<JOHN_SMITH_1> is john smith").text
    assert "41111111" not in masker.mask("<PERSON_4111111111111111>").text


@given(texts)
@settings(max_examples=150, deadline=None)
@example("John \u200b\u200b<PERSON_1>Smith")
@example("\u0130stanbul, Stra\u00dfe \ufb01 J\u0301o\u0301hn Smith\u0301")
def test_outside_of_the_spans_the_text_is_unchanged(masker: Masker, text: str) -> None:
    spans, masked = masker.find(text), masker.mask(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(left.end <= right.start for left, right in pairwise(spans))
    assert masked.counts == Counter(span.type for span in spans)
    placeholder = "<[A-Z][A-Z0-9_]*_[0-9]+>"
    assert re.fullmatch(placeholder.join(map(re.escape, _replaced(text, spans))), masked.text)
    if not spans:
        assert masked.text == text


@given(texts)
@settings(max_examples=150, deadline=None)
def test_masking_a_masked_text_changes_nothing(masker: Masker, text: str) -> None:
    once = masker.mask(text)
    again = masker.mask(once.text)
    assert again.text == once.text
    assert again.counts == {}


def test_many_are_masked_as_one_at_a_time(masker: Masker) -> None:
    many = [TEXT, "nothing here", "", "J\u043ehn Smith, 4111 1111 1111 1111"] * 3
    assert masker.mask_many(many) == [masker.mask(text) for text in many]


def test_texts_that_are_masked_together_name_one_value_by_one_placeholder(masker: Masker) -> None:
    texts = ["I am Jane Doe, and John Smith owes me", "thanks", "Dear <PERSON_3>, write to John Smith"]
    texts.append("no: Jane Doe, John Smith")
    masked = masker.mask_together(texts)
    assert [each.text for each in masked] == [
        "I am <PERSON_4>, and <PERSON_5> owes me",
        "thanks",
        "Dear <PERSON_3>, write to <PERSON_5>",
        "no: <PERSON_4>, <PERSON_5>",
    ]
    assert [each.counts for each in masked] == [{"PERSON": 2}, {}, {"PERSON": 1}, {"PERSON": 2}]
    assert masker.mask_together([]) == []
    with pytest.raises(MaskingError):
        masker.mask_together(["fine", "x" * 10_001])


@pytest.mark.parametrize(
    ("text", "says"), [("x" * 10_001, "10001 characters"), ("lone \ud800 surrogate", "Unicode"), (b"bytes", "bytes")]
)
def test_what_cannot_be_masked_is_refused(masker: Masker, text: Any, says: str) -> None:
    for refuse in (masker.mask, masker.find, lambda t: masker.mask_many([t])):
        with pytest.raises(MaskingError, match=says):
            refuse(text)


def test_a_result_that_an_event_cannot_hold_is_refused(masker: Masker) -> None:
    with pytest.raises(MaskingError):
        masker.mask("a@b.de, " * 1200)


def _raises(*_: object, **__: object) -> list[Span]:
    raise RuntimeError(f"cannot parse {SECRET}")


def _times_out(*_: object, **__: object) -> list[Span]:
    raise TimeoutError(SECRET)


@pytest.mark.parametrize("broken", [_raises, _times_out])
@pytest.mark.parametrize("part", ["presidio", "patterns", "names", "replacement"])
def test_a_failure_anywhere_gives_no_text_and_tells_nothing_of_it(
    part: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    masker = Masker()
    target, name = {
        "presidio": (masker._analyzer, "find"),
        "patterns": (patterns, "find"),
        "names": (masker._names, "find"),
        "replacement": (masker, "_replaced"),
    }[part]
    if part in ("presidio", "names"):
        monkeypatch.setattr(type(target), name, broken)
    else:
        monkeypatch.setattr(target, name, broken)
    for attempt in (masker.mask, lambda text: masker.mask_many([text])):
        with pytest.raises(MaskingError) as caught:
            attempt(TEXT)
        error = caught.value
        assert error.__context__ is None
        assert error.__cause__ is None
        assert SECRET not in f"{error} {error.cause} {error.hint}"


@pytest.mark.parametrize("offsets", [(-1, 4), (0, 10_000), (5, 5), (7, 2), (None, 3), ("0", "3")])
def test_nonsense_offsets_of_a_recogniser_are_a_failure(offsets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = RecognizerResult("PERSON", 0, 1, 0.9)
    result.start, result.end = offsets
    monkeypatch.setattr(AnalyzerEngine, "analyze", lambda *_, **__: [result])
    with pytest.raises(MaskingError, match="offsets"):
        Masker().mask(TEXT)


def test_the_deadline_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = patterns.Pattern("PERSON", 0.5, patterns.LETTER, r"(?:a|aa|aaa|b|ab|aab)++c|(?:a|aa|aaa|.a)+c")
    monkeypatch.setattr(patterns, "ALL", (slow,))
    with pytest.raises(MaskingError) as caught:
        Masker(deadline_s=0.2).mask("a" * 40 + "!")
    assert caught.value.cause == "the deadline passed"


def test_a_deadline_that_presidio_would_not_keep_is_refused() -> None:
    # Presidio skips a pattern that runs longer than its own limit: by then the deadline must have passed.
    limit = float(pattern_recognizer.REGEX_TIMEOUT_SECONDS)
    with pytest.raises(MaskingError, match="REGEX_TIMEOUT_SECONDS"):
        Masker(deadline_s=limit)


def test_what_never_settles_is_refused(masker: Masker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Finds the first letter that no earlier round has taken.
    monkeypatch.setattr(
        patterns, "find", lambda text, _: [Span(text.index("z"), text.index("z") + 1, "X", 0.5)] if "z" in text else []
    )
    with pytest.raises(MaskingError, match="rounds"):
        masker.mask("z" * 20)


@pytest.mark.slow
def test_nothing_touches_the_network() -> None:
    script = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "from fedloop_privacy.masking import Masker\n"
        "print(Masker().mask('write to john@example.co.uk or https://example.org/x').text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "write to <EMAIL_ADDRESS_1> or <URL_1>\n", done.stderr


def test_the_package_alone_imports_nothing_heavy() -> None:
    script = "import sys, fedloop_privacy.masking\nprint({'spacy', 'presidio_analyzer', 'faker', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def _mints(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "_from_masker"


def test_only_the_masker_mints_masked_text() -> None:
    allowed = Path(masker_module.__file__)
    sources = [
        path for room in ("events", "privacy", "tasks", "clients", "server", "cli") for path in (ROOT / room).rglob("*.py")
    ]
    assert allowed in sources
    callers = [path for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8"))) if _mints(node)]
    assert callers == [allowed]
    with pytest.raises(TypeError):
        MaskedText(text=TEXT)

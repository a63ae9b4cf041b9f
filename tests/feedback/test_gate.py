"""The second gate finds planted values wherever they stand, and never a placeholder."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import samples
from faker import Faker
from fedloop_cli.demo import users
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_privacy.masking import Masker
from fedloop_server.feedback.operators import gate
from fedloop_tasks.classification.task import Classification
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

FAKER_SEEDS = st.integers(0, 2**32 - 1)
# Words without digits, so that nothing but what is planted is found; marks and signs of every script among them.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Nd", "Nl", "No"], exclude_characters="%&<>\"'@=/+"), max_size=40)
SURROUNDING = st.one_of(WORDS, st.sampled_from(["<PERSON_1>", "on 12/27", "7", "room 12b:", "\n", "", "(", "for 2,500.00 EUR"]))
KEYS = {
    "AKIA": "ABCDEFGHIJ234567",
    "ghp_": "a1B2" * 9,
    "github_pat_": "a1B2_" * 6,
    "glpat-": "a1-B2" * 4,
    "xoxb-": "12345-abcde",
    "sk_live_": "a1B2" * 6,
    "sk-proj-": "a1B2-" * 6,
    "AIza": "a1B2_" * 7,
    "hf_": "aBcD" * 8,
    "npm_": "a1B2" * 9,
    "pypi-": "AgEI" * 15,
    "SG.": "a1B2" * 5 + "." + "a1B2" * 5,
    "eyJhbGciOiJFZERTQSJ9.": "eyJzdWIiOiIxIn0.c2ln",
    "Bearer ": "a1B2" * 6,
    "-----BEGIN RSA ": "PRIVATE KEY-----",
}
ADVERSARIAL = (
    *("a.", "1 ", "4 ", "41 ", "0 ", "+1 ", "a@", "a at ", "a at b dot ", "12-", "123-45-", "1.", "1.1.", "::", "ab:", "2001:"),
    *("AB12 ", "GB82W", "GB82 ", "http://a:", "http://", "?token=", "x://?&", "eyJa", "sk-", "-----BEGIN A ", "&amp;", "%25"),
    *(
        "%34%31",
        "<PERSON_1>",
        "<A",
        "phone 1",
        "call 1 ",
        "Bearer a",
        "\u0661 ",
        "(1) ",
        "1\n\n",
        "1_",
        "4-",
        "4111111111111111 ",
    ),
)


def planted() -> Iterator[tuple[str, st.SearchStrategy[str]]]:
    def made(name: str, locale: str = "en_US") -> st.SearchStrategy[str]:
        fake = Faker(locale)

        def value(seed: int) -> str:
            fake.seed_instance(seed)
            found: str = getattr(fake, name)()
            return found

        return FAKER_SEEDS.map(value)

    def grouped(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        def spread(value: str, separator: str) -> str:
            return separator.join(value[at : at + 4] for at in range(0, len(value), 4))

        return st.builds(spread, values, st.sampled_from(["", " ", "-"]))

    yield "EMAIL_ADDRESS", made("email")
    yield "EMAIL_ADDRESS", made("email").map(lambda value: value.replace("@", " at ").replace(".", " dot "))
    yield "EMAIL_ADDRESS", made("email").map(lambda value: value.replace("@", "%40"))
    yield "IP_ADDRESS", made("ipv4")
    yield "US_SSN", made("ssn")
    yield "CREDIT_CARD", grouped(made("credit_card_number").filter(lambda value: len(value) > 12))
    for locale in ("en_GB", "de_DE", "fr_FR", "nl_NL", "it_IT"):
        yield "IBAN_CODE", grouped(made("iban", locale))
    yield "PHONE_NUMBER", st.from_regex(r"\A(\([2-9]\d\d\) |[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}\Z")
    yield "PHONE_NUMBER", st.from_regex(r"\A\+(44 20|49 30|33 1|1)( \d{3}){2,3}\Z")
    yield "PHONE_NUMBER", st.from_regex(r"\A07\d{9}\Z")
    yield "SECRET", st.sampled_from([begin + end for begin, end in KEYS.items()])
    yield "URL_CREDENTIALS", st.from_regex(r"\A(https?|postgres)://[a-z]{1,8}:[a-z0-9]{4,8}@[a-z]{3,8}/[a-z]{0,4}\Z")
    yield "URL_CREDENTIALS", st.from_regex(r"\Ahttps://[a-z]{3,8}\.org/\?(a=b&)?(token|api_key|password)=[a-z]{6,8}\Z")


PLANTED = list(planted())


@pytest.mark.parametrize(("kind", "values"), PLANTED, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(PLANTED)])
def test_a_planted_value_is_found_whatever_stands_around_it(kind: str, values: st.SearchStrategy[str]) -> None:
    @settings(max_examples=20, deadline=None)
    @given(values, SURROUNDING, SURROUNDING)
    def found(value: str, before: str, after: str) -> None:
        # With the digits beside it, or by itself, a number can satisfy the checksum of cards.
        assert {kind, "CREDIT_CARD"} & gate.personal(f"{before} {value} {after}").keys(), (before, value, after)

    found()


@given(st.lists(st.one_of(WORDS, st.from_regex(r"\A<[A-Z][A-Z0-9_]{0,30}_[1-9]\d{0,3}>\Z"))), st.sampled_from(["", " ", "\n"]))
def test_a_placeholder_is_never_found(parts: list[str], between: str) -> None:
    assert gate.personal(between.join(parts)) == {}


def test_the_number_of_a_placeholder_is_no_part_of_another_one() -> None:
    assert gate.personal("ssn <DATE_TIME_123>45-6789") == {}
    assert gate.personal("ssn 123>45-6789") == {"US_SSN": 1}


def test_looks_alike_are_read_as_a_person_reads_them() -> None:
    assert gate.personal("４１１１ １１１１ １１１１ １１１１") == {"CREDIT_CARD": 1}  # noqa: RUF001
    assert gate.personal("jo\u200bhn@exam\u200bple.org") == {"EMAIL_ADDRESS": 1}
    assert gate.personal("2001:db8:85a3::8a2e:370:7334") == {"IP_ADDRESS": 1}


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112 has a wrong check digit",
        "so has GB82 WEST 1234 5698 7654 33",
        "version 10.300.2.1, 2 999.50 paid on order 99812 at 12:30:45",
        "std::vector<int> a::b, see https://example.org/?page=123456&lang=en",
        "risk-management is sky-high, ask-me-anything-about-it",
        "GB82 at 10 pounds and 20 pence each, in 2024 and 2025",
    ],
)
def test_what_only_looks_like_a_value_is_not_found(text: str) -> None:
    assert gate.personal(text) == {}


def test_every_text_of_feedback_is_read_and_each_value_counted() -> None:
    mail, card = "a@example.org", "4111 1111 1111 1111"
    plain = samples.feedback()
    assert gate.found(plain) == {}
    for name in ("text", "response", "correction", "comment"):
        assert gate.found(replace(plain, **{name: samples.masked(f"{mail} and {card}")})) == {
            "CREDIT_CARD": 1,
            "EMAIL_ADDRESS": 1,
        }
    for name in ("predicted", "label"):
        assert gate.found(replace(plain, **{name: mail})) == {"EMAIL_ADDRESS": 1}
    turns = [MaskedTurn(role="user", text=samples.masked(mail)), MaskedTurn(role="assistant", text=samples.masked(mail))]
    assert gate.found(replace(plain, context=turns)) == {"EMAIL_ADDRESS": 2}


def test_two_texts_are_not_read_as_one() -> None:
    halves = {"text": samples.masked("4111 1111"), "response": samples.masked("1111 1111")}
    assert gate.found(replace(samples.feedback(), **halves)) == {}


@pytest.mark.slow
def test_nothing_is_found_in_what_a_masker_has_masked() -> None:
    masker = Masker()
    messages = [message.text for device in users.invented(Classification, 8, seed=3).devices for message in device][:50]
    assert sum(bool(gate.personal(text)) for text in messages) > 5
    assert [text for text in map(masker.mask, messages) if gate.personal(text.text)] == []


@pytest.mark.slow
def test_no_text_takes_long() -> None:
    slow = {}
    for unit in ADVERSARIAL:
        began = time.process_time()
        gate.personal((unit * 12_000)[:11_990] + "!@\u00e9")
        if (took := time.process_time() - began) > 1:
            slow[unit] = took
    assert slow == {}


def test_masked_texts_cannot_hide_by_their_counts() -> None:
    claimed = msgspec.convert({"text": "a@example.org", "counts": {"EMAIL_ADDRESS": 1}}, MaskedText)
    assert gate.found(replace(samples.feedback(), text=claimed)) == {"EMAIL_ADDRESS": 1}

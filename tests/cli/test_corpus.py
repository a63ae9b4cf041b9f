"""The demo's corpus is what its generator makes, and is what the demo needs."""

from __future__ import annotations

from importlib import resources

import faker
import pytest
from fedloop_cli import corpus
from fedloop_cli.corpus import generate


def test_the_generator_makes_the_files_in_the_package_byte_by_byte() -> None:
    if faker.VERSION != generate.FAKER:
        pytest.skip(f"the corpus is made with Faker {generate.FAKER}, not {faker.VERSION}")
    for part, text in generate.generate().items():
        packaged = resources.files("fedloop_cli.corpus").joinpath(f"{part}.csv").read_bytes()
        assert text == packaged.decode()
        assert len(packaged) < 600_000


def test_there_are_enough_messages_and_intents_and_no_message_is_in_both_parts() -> None:
    train, test = corpus.load("train"), corpus.load("test")
    assert len({message.text for message in train}) == len(train) >= 1_500
    assert len({message.answer for message in train}) >= 12
    assert {message.answer for message in test} == {message.answer for message in train}
    assert not {message.text for message in test} & {message.text for message in train}


def test_planted_values_stand_in_their_message_and_cover_every_kind() -> None:
    kinds: dict[str, int] = {}
    for message in corpus.load("train"):
        for kind, value in message.planted:
            assert value in message.text
            kinds[kind] = kinds.get(kind, 0) + 1
    expected = "PERSON EMAIL_ADDRESS PHONE_NUMBER IBAN_CODE CREDIT_CARD US_SSN ADDRESS CITY POSTCODE DATE_OF_BIRTH ACCOUNT_NUMBER"
    assert kinds.keys() == {*expected.split(), "IP_ADDRESS"}
    assert min(kinds.values()) >= 15

"""Made-up messages to a bank, with the personal values that were planted in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from faker import Faker

Message = tuple[str, list[tuple[str, str]]]

_TEMPLATES = (
    "Hi, this is {PERSON}. I ordered a new card last week and it has not arrived, could you check? My phone is {PHONE_NUMBER}.",
    "My card {CREDIT_CARD} was declined at a petrol station in {LOCATION} although there is money on it.",
    "Please close the account {ACCOUNT_NUMBER}, I moved to {STREET_ADDRESS} in the spring. Regards, {PERSON}",
    "I sent 250 to {IBAN_CODE} by mistake, the payee should have been {PERSON}, how do I get it back?",
    "Someone logged in from {IP_ADDRESS} and changed my e-mail to {EMAIL_ADDRESS}. That was not me!",
    "For the identity check: born {DATE_TIME}, social security number {US_SSN}, living at {STREET_ADDRESS}.",
    "{PERSON} here. The transfer from {PERSON} still shows as pending. Reply to {EMAIL_ADDRESS} please",
    "Why was I charged twice for my top up? call me on {PHONE_NUMBER} or write to {EMAIL_ADDRESS}, thanks {PERSON}",
    "Dear team, my husband {PERSON} lost his wallet in {LOCATION}. His card number is {CREDIT_CARD}; block it.",
    "Can I add {PERSON} as a second holder on account number {ACCOUNT_NUMBER}? Her birthday is {DATE_TIME}.",
    "date of birth {DATE_TIME}, ssn {US_SSN}, the app keeps asking me to verify my identity",
    "I am travelling to {LOCATION} next month. Does my card work there? Yours sincerely, {PERSON}",
    "My new address is {STREET_ADDRESS}, {LOCATION}. Kindly update it and confirm to {EMAIL_ADDRESS}.",
    "The salary from my employer should go to {IBAN_CODE}, not to {ACCOUNT_NUMBER}.",
    "Name: {PERSON}\nPhone: {PHONE_NUMBER}\nCard: {CREDIT_CARD}\nProblem: the machine swallowed my card",
    "Ms {LAST_NAME} at the branch in {LOCATION} told me the fee would be refunded. It was not.",
    "my name is {PERSON} and my mother {PERSON} sent me money yesterday, where is it?",
    "I tried three times from {IP_ADDRESS} and the login page says blocked. My user is {EMAIL_ADDRESS}",
    "{PERSON}'s payment of 40 pounds never reached me. Ask {FIRST_NAME} yourself if you like.",
    "Hello {FIRST_NAME}, thanks for the chat. As agreed: {PHONE_NUMBER}, {STREET_ADDRESS}.",
)
_CITIES = ("Manchester", "Boston", "Lisbon", "Leeds", "Chicago", "Vienna", "Glasgow", "Denver", "Osaka", "Cardiff")
_DATES = ("%d/%m/%Y", "%Y-%m-%d", "%B %d, %Y", "%d %b %Y", "%m.%d.%y")
_AS_TYPED: tuple[tuple[float, Callable[[str], str]], ...] = ((0.8, str), (0.92, str.lower), (1.0, str.upper))


def messages(count: int, seed: int) -> Iterator[Message]:
    """`count` messages with American and British values; one in five is typed in lower case or in capitals throughout."""
    rng = random.Random(seed)
    fakes = [Faker("en_US"), Faker("en_GB")]
    for fake in fakes:
        fake.seed_instance(rng.random())
    for _ in range(count):
        fake = rng.choice(fakes)
        draw = rng.random()
        typed = next(change for limit, change in _AS_TYPED if draw < limit)
        planted: list[tuple[str, str]] = []
        text = rng.choice(_TEMPLATES)
        while "{" in text:
            before, _, rest = text.partition("{")
            kind, _, after = rest.partition("}")
            value = _value(kind, fake, rng)
            planted.append((kind, typed(value)))
            text = before + value + after
        yield typed(text), planted


def _value(kind: str, fake: Faker, rng: random.Random) -> str:
    makers: dict[str, Callable[[], str]] = {
        "PERSON": lambda: f"{fake.first_name()} {fake.last_name()}",
        "FIRST_NAME": fake.first_name,
        "LAST_NAME": fake.last_name,
        "LOCATION": lambda: rng.choice(_CITIES),
        "PHONE_NUMBER": fake.phone_number,
        "EMAIL_ADDRESS": fake.email,
        "CREDIT_CARD": lambda: _grouped(fake.credit_card_number(), rng),
        "IBAN_CODE": lambda: _grouped(fake.iban(), rng),
        "US_SSN": lambda: rng.choice(("{}-{}-{}", "{} {} {}", "{}{}{}")).format(*_ssn(rng)),
        "IP_ADDRESS": fake.ipv4_public,
        "ACCOUNT_NUMBER": lambda: str(rng.randrange(10**7, 10**10)),
        "STREET_ADDRESS": lambda: fake.street_address().replace("\n", ", "),
        "DATE_TIME": lambda: fake.date_of_birth().strftime(rng.choice(_DATES)),
    }
    return makers[kind]()


def _ssn(rng: random.Random) -> tuple[str, str, str]:
    return f"{rng.randrange(1, 899):03}", f"{rng.randrange(1, 99):02}", f"{rng.randrange(1, 9999):04}"


def _grouped(digits: str, rng: random.Random) -> str:
    separator = rng.choice(("", "", " ", "-"))
    return separator.join(digits[at : at + 4] for at in range(0, len(digits), 4))

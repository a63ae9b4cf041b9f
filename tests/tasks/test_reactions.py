"""What users' reactions to a language model's answers teach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fedloop_events.masked import MaskedTurn
from fedloop_tasks.causal.examples import Example, Feedback, Judged, Pair
from fedloop_tasks.causal.reactions import Learns, examples
from fedloop_tasks.task import Interaction
from fedloop_tasks.turns import Turn
from samples import masked

ASKED = (Turn("user", "q"),)


def said(response_id: str = "a", answer: str | None = "A", **what: Any) -> Interaction:
    return Interaction(
        interaction_id=response_id,
        release="0001-x",
        prompt=masked("q"),
        response=None if answer is None else masked(answer),
        **what,
    )


def edited(text: str, response_id: str = "a", answer: str | None = "A") -> Interaction:
    return said(response_id, answer, edit=masked(text))


@pytest.mark.parametrize(
    ("given", "learns", "taught"),
    [
        ([edited("B")], "feedback", [Pair(ASKED, "B", "A", learn=True)]),
        ([edited("B")], "sft", [Example(ASKED, "B")]),
        ([edited("B")], "kto", [Judged(ASKED, "B", good=True)]),
        ([edited("B")], "dpo", [Pair(ASKED, "B", "A")]),
        ([edited("A")], "feedback", [Example(ASKED, "A")]),
        ([edited("A")], "dpo", []),
        ([edited("B", answer=None)], "feedback", [Example(ASKED, "B")]),
        ([edited("B"), edited("C")], "sft", [Example(ASKED, "C")]),
        ([edited("B"), said(thumb="down")], "sft", [Example(ASKED, "B")]),
        ([said(thumb="up")], "feedback", [Judged(ASKED, "A", good=True)]),
        ([said(thumb="up")], "sft", [Example(ASKED, "A")]),
        ([said(thumb="up")], "dpo", []),
        ([said(thumb="down")], "kto", [Judged(ASKED, "A", good=False)]),
        ([said(thumb="down")], "sft", []),
        ([said(thumb="down"), said(thumb="up")], "feedback", [Judged(ASKED, "A", good=True)]),
        ([said(rating=5)], "feedback", [Judged(ASKED, "A", good=True)]),
        ([said(rating=2)], "feedback", [Judged(ASKED, "A", good=False)]),
        ([said(rating=3)], "feedback", []),
        ([said(rating=5), said(rating=3)], "feedback", []),
        ([said(answer=None, thumb="up")], "feedback", []),
        ([said(signal="copied")], "feedback", []),
    ],
)
def test_what_a_user_did_about_one_response(given: Sequence[Interaction], learns: Learns, taught: list[Feedback]) -> None:
    assert examples(given, learns) == taught


PREFERRED = [said("b", "B"), said("a", "A", preferred_over="b")]


@pytest.mark.parametrize(
    ("given", "learns", "taught"),
    [
        (PREFERRED, "feedback", [Pair(ASKED, "A", "B")]),
        (PREFERRED, "dpo", [Pair(ASKED, "A", "B")]),
        (PREFERRED, "kto", [Judged(ASKED, "A", good=True)]),
        (PREFERRED, "sft", []),
        ([said("b", "B", thumb="down"), PREFERRED[1]], "feedback", [Pair(ASKED, "A", "B")]),
        ([said("b", "B", thumb="down"), PREFERRED[1]], "kto", [Judged(ASKED, "B", good=False), Judged(ASKED, "A", good=True)]),
        ([edited("C", "b", "B"), PREFERRED[1]], "feedback", [Pair(ASKED, "C", "B", learn=True), Judged(ASKED, "A", good=True)]),
        ([*PREFERRED, edited("C")], "feedback", [Pair(ASKED, "C", "A", learn=True)]),
        ([PREFERRED[1]], "feedback", [Judged(ASKED, "A", good=True)]),
        ([said("b", "A"), PREFERRED[1]], "dpo", []),
        ([*PREFERRED, said("c", "C", preferred_over="b")], "feedback", [Pair(ASKED, "A", "B"), Judged(ASKED, "C", good=True)]),
        ([said("a", "A", preferred_over="b"), said("b", "B", preferred_over="a")], "feedback", [Pair(ASKED, "A", "B")]),
        ([said("a", "A", preferred_over="a")], "feedback", [Judged(ASKED, "A", good=True)]),
    ],
)
def test_two_answers_make_a_pair_and_no_response_is_used_twice(
    given: Sequence[Interaction], learns: Learns, taught: list[Feedback]
) -> None:
    assert examples(given, learns) == taught


@pytest.mark.parametrize("learns", ["feedback", "sft", "kto", "dpo"])
def test_a_response_makes_one_example_at_most_whatever_was_done_about_it(learns: Learns) -> None:
    names = ["a", "b", "c", "d"]
    done: list[dict[str, Any]] = [{"thumb": "up"}, {"rating": 1}, {"edit": masked("Z")}]
    given = [said(name, name.upper(), **what) for name in names for what in done]
    given += [said(name, name.upper(), preferred_over=other) for name in names for other in names if other != name]
    answers = [text for each in examples(given, learns) for text in _answers(each) if text != "Z"]
    assert len(answers) == len(set(answers))
    assert len(examples(given, learns)) <= len(names)


def _answers(taught: Feedback) -> list[str]:
    return [taught.chosen, taught.rejected] if isinstance(taught, Pair) else [taught.answer]


def test_the_conversation_before_a_prompt_is_learnt_with_it() -> None:
    before = [MaskedTurn("system", masked("s")), MaskedTurn("user", masked("u")), MaskedTurn("assistant", masked("v"))]
    turns = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "v"), *ASKED)
    assert examples([said(context=before, edit=masked("B"))], "sft") == [Example(turns, "B")]

"""Turns of a conversation as the model's own chat template writes them, in tokens.

What a user has written is text, whatever it looks like: a token that has a meaning in the template, such as the end of a turn,
never comes out of it, so nobody can speak as the system. Prompt and answer are turned into tokens apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fedloop_events.errors import FedloopError
from jinja2 import TemplateError
from msgspec import Struct

from fedloop_tasks.task import ModelError
from fedloop_tasks.turns import Turn

_PLACE: Final = "\ue000"
"""Stands where a turn's text will: a character that templates let through and nobody's template has."""


class TooLongError(FedloopError):
    """An answer does not fit into the tokens that the model takes, however much of its prompt is cut off."""


class Encoded(Struct, frozen=True):
    """A prompt and its answer in tokens, the end of the turn included."""

    ids: list[int]
    start: int
    """Where the answer begins."""
    cut: int
    """How many tokens of the prompt were cut off at its beginning."""
    begin: int
    """Where the adapters begin to act: 0, or where the prompt's invocation begins."""


class Chat:
    """The prompts and answers of one tokenizer.

    A model without a chat template gets each turn's text on a line of its own. Raises ModelError for a tokenizer that says no end
    of a text, or whose tokens a user could write, and for `activated` adapters whose template has no invocation.
    """

    def __init__(self, tokenizer: Any, *, activated: bool = False) -> None:
        self._tokenizer, self._activated = tokenizer, activated
        template = tokenizer.chat_template
        if template is not None and not isinstance(template, str):
            raise ModelError("the tokenizer has several chat templates", hint="keep the one that the model answers with")
        turn = (Turn("user", ""),)
        frame = [*self._frame(turn, answered=False), *self._frame((*turn, Turn("assistant", "")), answered=True)]
        framed = {n for piece in frame for n in self._parsed(piece)}
        added = tokenizer.added_tokens_decoder.items()
        self._special: dict[int, str] = {n: str(token) for n, token in added if token.special or n in framed}
        end = [n for n in self._parsed(frame[-1]) if n in self._special]
        if not end and tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no token that ends an answer", hint="use a base model whose tokenizer names one")
        self.end: int = end[0] if end else tokenizer.eos_token_id
        """The token that ends an answer."""
        self.ends: frozenset[int] = frozenset({self.end, tokenizer.eos_token_id} - {None})
        self._check_unforgeable()
        self.invocation: tuple[int, ...] = self._invocation(self._frame(turn, answered=False)[-1])
        """The tokens with which the assistant's turn begins, after each prompt's last text, such as `<|im_start|>assistant` and a
        line's end; none where the template marks it by no token of its own. PEFT's `alora_invocation_tokens`."""
        if activated and not self.invocation:
            raise ModelError(
                "no token of the chat template marks where the assistant's turn begins", hint="use a spec with activated = false"
            )

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of the turns, at least one, up to where the assistant begins to write. Raises ModelError for turns that the
        template does not take, such as two of the user in a row."""
        pieces = self._frame(turns, answered=False)
        whole = self._parsed(self._written([turn.content for turn in turns], turns, answered=False))
        special = [n for piece in pieces for n in self._parsed(piece) if n in self._special]
        plain = all(self._special.keys().isdisjoint(self._parsed(turn.content)) for turn in turns)
        if plain and [n for n in whole if n in self._special] == special:
            return whole
        if len(pieces) != len(turns) + 1:
            raise ModelError("the chat template does not write each turn once", hint="use a model with another template")
        ids = self._parsed(pieces[0])
        for turn, piece in zip(turns, pieces[1:], strict=True):
            ids += self.text(turn.content) + self._parsed(piece)
        return ids

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, and the one that ends it."""
        return [*self.text(text), self.end]

    def text(self, text: str) -> list[int]:
        """The tokens of what somebody has written: none of them has a meaning of its own."""
        return self._tokens(text, split_special_tokens=True)

    def encode(self, turns: Sequence[Turn], answer: str, most: int) -> Encoded:
        """At most `most` tokens: the prompt loses its beginning, the answer nothing.

        Raises TooLongError for an answer beside which the end of the last turn does not fit, and one token of what it says.
        """
        prompt, answered = self.prompt(turns), self.answer(answer)
        room, least = most - len(answered), len(self._parsed(self._frame(turns, answered=False)[-1])) + 1
        if room < min(least, len(prompt)):
            raise TooLongError(
                f"an answer of {len(answered)} tokens does not fit into {most} beside its prompt",
                hint="shorten it",
            )
        cut = max(0, len(prompt) - room)
        kept = prompt[cut:]
        return Encoded(kept + answered, len(kept), cut, self.begin(kept))

    def begin(self, prompt: Sequence[int]) -> int:
        """Where in a prompt the adapters begin to act: see `Encoded`. Raises ModelError for one that ends with no invocation."""
        if not self._activated:
            return 0
        begin = len(prompt) - len(self.invocation)
        if begin < 0 or tuple(prompt[begin:]) != self.invocation:
            raise ModelError(
                "the chat template ends these turns in another way than others", hint="use a model with another template"
            )
        return begin

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without those that have a meaning of their own."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _frame(self, turns: Sequence[Turn], *, answered: bool) -> list[str]:
        """What the template writes before, between and after the turns' texts."""
        return self._written([_PLACE] * len(turns), turns, answered=answered).split(_PLACE)

    def _written(self, contents: Sequence[str], turns: Sequence[Turn], *, answered: bool) -> str:
        if self._tokenizer.chat_template is None:
            lines = "".join(f"{content}\n" for content in contents)
            return (self._tokenizer.bos_token or "") + (lines.removesuffix("\n") if answered else lines)
        written = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
        try:
            text: str = self._tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=not answered)
        except TemplateError as error:
            raise ModelError("the model's chat template does not take these turns", cause=str(error)) from error
        return text

    def _parsed(self, text: str) -> list[int]:
        return self._tokens(text, split_special_tokens=False)

    def _tokens(self, text: str, *, split_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens, truncation=False, padding=False
        )["input_ids"]
        return ids

    def _invocation(self, last: str) -> tuple[int, ...]:
        """Of what the template writes after the last text: from a token of its own on, rather not the end of that text, because
        other tokens depend on what the text is."""
        ids = self._parsed(last)
        special = [i for i, n in enumerate(ids) if n in self._special]
        begins = [i for i in special if ids[i] not in self.ends] or [i for i in special if i + 1 < len(ids)]
        return tuple(ids[begins[0] :]) if begins else ()

    def _check_unforgeable(self) -> None:
        special = {*self._special, *self.ends}
        for n in special:
            token = self._special.get(n) or self._tokenizer.convert_ids_to_tokens(n)
            if not special.isdisjoint(self.text(f"a{token}b")):
                raise ModelError(
                    f"whoever writes {token!r} to this model writes a token of its template",
                    hint="mark it special in tokenizer.json",
                )

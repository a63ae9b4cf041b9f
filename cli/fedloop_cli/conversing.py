"""A conversation in a terminal: what is typed is asked, and commands give feedback on the answer before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fedloop_events.errors import FedloopError, UsageError

from fedloop_cli.console import printable

if TYPE_CHECKING:
    from fedloop_clients.agent import Agent
    from rich.console import Console

COMMANDS: Final = {
    "/up": "the answer was good; after /retry, better than the one before it",
    "/down": "the answer was not good",
    "/fix TEXT": "what it should have said: the conversation goes on with that",
    "/retry": "answer once more, in other words",
    "/new": "begin a new conversation",
    "/help": "these commands",
    "/quit": "end (so does Ctrl-D); Ctrl-C ends an answer that is being written",
}
RETRY_TEMPERATURE: Final = 0.8
"""At which the answer after /retry is drawn: the most probable one was there already."""
RETRIED: Final = "retried"
"""The signal that /retry gives about the answer before it."""
REMEMBERED: Final = "as it was corrected before"


class Conversation:
    """What was said so far, and the answer that feedback is about."""

    def __init__(self, agent: Agent, screen: Console) -> None:
        self._agent, self._screen = agent, screen
        self._turns: list[dict[str, str]] = []
        self._answer: str | None = None
        """The id of the newest answer."""
        self._worse: str | None = None
        """That of the one that it was asked for again after."""

    def take(self, line: str) -> bool:
        """Do what a line asks for; whether the conversation goes on. An error is shown, and the conversation is as it was."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        try:
            if not name.startswith("/"):
                self._ask(line.strip())
            elif (command := self._commands().get(name)) is not None:
                command(rest.strip())
            else:
                raise UsageError(f"there is no command {name}", hint="/help lists those that there are")
        except FedloopError as error:
            self._tell(f"{error.message}{f'; {error.hint}' if error.hint else ''}", "red")
        return True

    def help(self, rest: str = "") -> None:
        """Show the commands."""
        for name, meaning in COMMANDS.items():
            self._tell(f"{name:<10} {meaning}", "dim")

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/up": self._up,
            "/down": self._down,
            "/fix": self._fix,
            "/retry": self._retry,
            "/new": self._new,
            "/help": self.help,
        }

    def _ask(self, text: str) -> None:
        if not text:
            return
        self._answered([*self._turns, {"role": "user", "content": text}], temperature=0.0)
        self._worse = None

    def _up(self, rest: str) -> None:
        given = self._agent.feedback(self._known(), thumb="up", preferred_over=self._worse)
        self._thank(given.note)

    def _down(self, rest: str) -> None:
        self._thank(self._agent.feedback(self._known(), thumb="down").note)

    def _fix(self, rest: str) -> None:
        if not rest:
            raise UsageError("/fix is followed by what the answer should have been")
        self._thank(self._agent.feedback(self._known(), correction=rest).note)
        if self._turns and self._turns[-1]["role"] == "assistant":
            self._turns[-1] = {"role": "assistant", "content": rest}

    def _retry(self, rest: str) -> None:
        before = self._known()
        if not self._agent.task.speaks:
            raise UsageError("this model has one answer to a text: it would be the same", hint="say what is right with /fix")
        self._agent.feedback(before, signal=RETRIED)
        self._answered(self._turns[:-1], temperature=RETRY_TEMPERATURE)
        self._worse = before

    def _new(self, rest: str) -> None:
        self._turns, self._answer, self._worse = [], None, None
        self._tell("a new conversation", "dim")

    def _known(self) -> str:
        if self._answer is None:
            raise UsageError("there is no answer yet that this could be about", hint="ask something first")
        return self._answer

    def _answered(self, turns: list[dict[str, str]], *, temperature: float) -> None:
        """Answer the last of the turns, which the conversation then has."""
        if not self._agent.task.speaks:
            response = self._agent.predict(turns[-1]["content"])
            self._show(f"{response.answer} ({response.confidence:.0%})\n")
            self._answer = response.response_id
            self._note(response.note or (REMEMBERED if response.remembered else ""))
            return
        stream = self._agent.chat(turns, stream=True, temperature=temperature)
        text = ""
        try:
            for piece in stream:
                text += piece
                self._show(piece)
        except KeyboardInterrupt:
            stream.close()
        self._show("\n")
        if stream.response is not None:
            self._turns = [*turns, {"role": "assistant", "content": text}]
            self._answer = stream.response.response_id
            self._note(stream.response.note or (REMEMBERED if stream.response.remembered else ""))

    def _thank(self, note: str) -> None:
        self._tell("kept", "green")
        self._note(note)

    def _note(self, note: str) -> None:
        if note:
            self._tell(note, "yellow")

    def _tell(self, text: str, style: str) -> None:
        self._screen.print(printable(text), style=style, markup=False, highlight=False)

    def _show(self, piece: str) -> None:
        """A piece of an answer: its line breaks are kept, and nothing in it steers the terminal."""
        lines = "\n".join(printable(line) for line in piece.split("\n"))
        self._screen.print(lines, end="", style="cyan", markup=False, highlight=False, soft_wrap=True)

"""`fedloop agent`: one device. Its store remembers the deployment that it was enrolled in; `--log` and `--blobs` outweigh it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from fedloop_cli import console, options, task_options
from fedloop_cli.commands import sidecar

if TYPE_CHECKING:
    from fedloop_clients.agent import Agent
    from fedloop_clients.chatting import ChatResponse
    from fedloop_clients.device import Settings, Status
    from fedloop_clients.feedback import Response

app = options.group(help="Be a device: enrol, answer, take feedback, take part in rounds.")
app.command(cls=options.Command)(sidecar.serve)
app.command(cls=options.Command)(sidecar.chat)

Text = Annotated[str | None, typer.Option("--text", help="What the user wrote; - reads standard input.")]
ModelDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where base models lie.")]


@app.command(cls=options.Command)
def enrol(
    where: options.DeploymentFolder,
    store: options.StoreFolder,
    client_id: Annotated[str | None, typer.Option(metavar="NAME", help="The device's name.", show_default="a new one")] = None,
    epsilon: Annotated[float, typer.Option(help="Its privacy budget for its whole life.")] = 8.0,
    delta: Annotated[float, typer.Option(help="The delta of that budget.")] = 1e-5,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Allow rounds without differential privacy.")] = False,
    key_from: Annotated[
        Literal["auto", "keyring", "file"],
        typer.Option(help="Where the store's key is kept: the system's keyring, or a file (0600)."),
    ] = "auto",
    json: options.Json = False,
) -> None:
    """Make this device a client of the deployment in DIR or at --log. Called again with the same terms it changes nothing."""
    from fedloop_events.errors import UsageError

    place = where.place
    if place.blobs is None:
        raise UsageError("nothing says where the blobs are", hint="name their folder or URL with --blobs")

    from fedloop_clients.agent import Agent

    with Agent.enrol(
        place.log,
        store,
        blobs=place.blobs,
        client_id=client_id,
        epsilon=None if no_dp else epsilon,
        delta=delta,
        key_from=key_from,
    ) as agent:
        me = agent.identity
    document = {"client_id": me.client_id, "origin": me.origin, "epsilon": me.epsilon, "delta": me.delta, "store": str(store)}
    console.show(document, lambda: console.fields(document), as_json=json)


@app.command(cls=options.Command)
def predict(store: options.StoreFolder, text: Text = None, model_dir: ModelDir = None, json: options.Json = False) -> None:
    """Answer a text with the release in force; the response's id is what feedback names."""
    with _open(store, model_dir) as agent:
        response = _answered(agent, _given(text), None)
    document = {name: getattr(response, name) for name in response.__struct_fields__}
    console.show(document, lambda: console.fields(document), as_json=json)


def _answered(agent: Agent, text: str, shown: str | None) -> Response | ChatResponse:
    """An answer of now, or the one that was `shown`."""
    if agent.task.speaks:
        asked = [{"role": "user", "content": text}]
        return agent.chat(asked) if shown is None else agent.record_answer(asked, shown)
    return agent.predict(text) if shown is None else agent.record(text, shown)


@app.command(cls=task_options.RemarksCommand)
def feedback(
    store: options.StoreFolder,
    response: Annotated[str | None, typer.Option(metavar="ID", help="The response it is about.")] = None,
    text: Text = None,
    predicted: Annotated[str | None, typer.Option(help="The answer that the user was shown for --text.")] = None,
    thumb: Annotated[Literal["up", "down"] | None, typer.Option(show_default=False)] = None,
    rating: Annotated[int | None, typer.Option(help="1 to 5.")] = None,
    correction: Annotated[str | None, typer.Option(help="What it should have said, in the user's words.")] = None,
    comment: Annotated[str | None, typer.Option(help="Anything else.")] = None,
    signal: Annotated[str | None, typer.Option(metavar="WORD", help='What the user did besides, such as "copied".')] = None,
    audio: Annotated[Path | None, typer.Option(metavar="FILE", help="A recording: what is said in it is a comment.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture: what is written in it is a comment.")] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE", help="A film: what is said and written in it is one.")] = None,
    speech_model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A Whisper model for faster-whisper, which --audio and --video need.")
    ] = None,
    feedback_id: Annotated[str | None, typer.Option(metavar="ID", help="Sent again, the same id counts once.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Many at once (CSV, JSON Lines, Parquet): answer each text, then say what is right."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows of --data that cannot be used; else one of them refuses the file.")
    ] = False,
    model_dir: ModelDir = None,
    json: options.Json = False,
) -> None:
    """Record feedback on a response: one made before (--response), one shown elsewhere (--text with --predicted), or one
    made now (--text alone). It is on disk when this returns; `fedloop agent run` publishes it, masked.
    """
    from fedloop_clients.device import Settings
    from fedloop_events.errors import UsageError

    if sum(each is not None for each in (response, text, data)) != 1:
        raise UsageError("feedback is about one of --response, --text or --data")
    task_options.check_columns(data)
    with _open(store, model_dir, Settings(model_dir=model_dir, speech_model=speech_model)) as agent:
        if data is not None:
            _take_in(agent, data, skip_bad, json)
            return
        remarks = _remarks(agent)
        if response is None:
            response = _answered(agent, _given(text), predicted).response_id
        recorded = agent.feedback(
            response,
            thumb=thumb,
            rating=rating,
            correction=correction,
            comment=comment,
            signal=signal,
            audio=audio,
            image=image,
            video=video,
            feedback_id=feedback_id,
            **remarks,
        )
    document = {name: getattr(recorded, name) for name in recorded.__struct_fields__}
    console.show(document, lambda: console.fields(document), as_json=json)


@app.command(cls=options.Command)
def retract(
    store: options.StoreFolder,
    feedback_id: Annotated[str, typer.Argument(metavar="FEEDBACK_ID")],
    json: options.Json = False,
) -> None:
    """Take feedback back: it is deleted from the device, and no later round learns from it. `fedloop agent run` appends the
    retraction, if the feedback was published. What rounds have learned from it before is not undone, nor is the epsilon.
    """
    with _open(store, None) as agent:
        retraction = agent.retract(feedback_id)
    follows = "; `fedloop agent run` appends its retraction" if retraction.published else ", and nothing of it was published"
    document = {"feedback_id": retraction.feedback_id, "published": retraction.published, "remains": retraction.remains}
    text = f"{retraction.feedback_id} is deleted from this device{follows}.\nNot undone: {retraction.remains}."
    console.show(document, text, as_json=json)


@app.command(cls=options.Command)
def personalise(
    store: options.StoreFolder,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the personal layer: the release answers alone.")] = False,
    model_dir: ModelDir = None,
    json: options.Json = False,
) -> None:
    """Train a personal layer on this device's own feedback, for `chat` and `serve` here. It never leaves the device, and is kept
    only if it answers examples better that it was not trained with.
    """
    with _open(store, model_dir) as agent:
        if remove:
            removed = agent.forget_personal()
            console.show({"removed": removed}, "it is deleted" if removed else "there was none", as_json=json)
            return
        found = agent.personalise()
    document = {"kept": found.kept, **msgspec.to_builtins(found.layer)}
    outcome = "kept" if found.kept else "not kept, for it is no better than the release alone"
    console.show(document, f"{outcome}: {found.layer.sentence}", as_json=json)


@app.command(cls=options.Command)
def run(
    store: options.StoreFolder,
    until_settled: Annotated[bool, typer.Option("--until-settled", help="End when all feedback is published.")] = False,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="End after answering so many rounds.")] = None,
    model_dir: ModelDir = None,
    base_dtype: options.BaseDtype = "auto",
    json: options.Json = False,
    only_charging: Annotated[bool, typer.Option("--only-charging", help="Take part only while it charges.")] = False,
    only_unmetered: Annotated[bool, typer.Option("--only-unmetered", help="Only on a network that is not metered.")] = False,
    only_idle: Annotated[bool, typer.Option("--only-idle", help="Only while under half of its cores are busy.")] = False,
    hours: Annotated[str | None, typer.Option(help="Only in these hours, as in 22-06 or 12:30-13:15,22-06.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="Whose hours, as in Europe/Berlin.", show_default="its own")] = None,
    min_gap: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Least time between rounds.")] = 0.0,
    rounds_per_day: Annotated[int, typer.Option(min=1, help="Most rounds in 24 hours.")] = 48,
    scratch_mb: options.ScratchMb = None,
    rank: options.Rank = None,
    use_case: options.UseCase = "default",
) -> None:
    """Mask and publish feedback and take part in rounds, until Ctrl-C. Killed and started again, it goes on where it was.

    It declines each round that is asked while the owner's terms (--only-... to --rounds-per-day) do not hold, or that trains
    adapters of a higher rank than --rank and takes no less.
    """
    from fedloop_clients.device import Settings
    from fedloop_clients.eligibility import Eligibility, of_platform
    from fedloop_events.errors import UsageError
    from fedloop_events.hours import DayHours

    from fedloop_cli.signals import stoppable

    if hours is None and time_zone is not None:
        raise UsageError("--time-zone says whose hours are meant, and there are none", hint="give --hours as well")
    terms = Eligibility(
        only_charging=only_charging,
        only_unmetered=only_unmetered,
        only_idle=only_idle,
        hours=None if hours is None else DayHours.parse(hours, time_zone),
        min_gap_s=min_gap,
        rounds_per_day=rounds_per_day,
    )
    terms.check_known(of_platform())
    settings = Settings(
        use_case=use_case,
        model_dir=model_dir,
        eligibility=terms,
        base_dtype=base_dtype,
        scratch_bytes=options.in_bytes(scratch_mb),
        rank=rank,
    )
    with _open(store, model_dir, settings) as agent, stoppable() as stop:
        before, shown = sum(agent.status().answers.values()), ""

        def enough(status: Status) -> bool:
            nonlocal shown
            line = _summary(status)
            if line != shown:
                shown = line
                console.note(line)
            answered = sum(status.answers.values()) - before
            return (until_settled and status.settled) or (rounds is not None and answered >= rounds)

        agent.run(stop.event, enough)
        status = agent.status()
    console.show(_document(status), lambda: _text(status), as_json=json)
    if stop.interrupted:
        raise typer.Exit(130)


@app.command(cls=options.Command)
def status(store: options.StoreFolder, json: options.Json = False) -> None:
    """Say where the device stands: feedback, examples, answers, budget."""
    with _open(store, None) as agent:
        status = agent.status()
    console.show(_document(status), lambda: _text(status), as_json=json)


def _open(store: Path, model_dir: Path | None, settings: Settings | None = None) -> Agent:
    from fedloop_clients.agent import Agent
    from fedloop_clients.device import Settings

    log, blobs = options.given()
    return Agent.open(store, log, blobs=blobs, settings=settings or Settings(model_dir=model_dir))


def _given(text: str | None) -> str:
    from fedloop_events.errors import UsageError

    if text is None:
        raise UsageError("there is no text", hint="give it with --text, or --text - to read standard input")
    return sys.stdin.read() if text == "-" else text


def _remarks(agent: Agent) -> dict[str, Any]:
    """What its task alone takes of a user. A device that knows no model yet takes what every task does."""
    if not task_options.given():
        return {}
    task_options.check(agent.task)
    return {name.replace("-", "_"): value for name, value in task_options.of_task(agent.task.remarks).items()}


def _take_in(agent: Agent, data: Path, skip_bad: bool, json: bool) -> None:
    """Feedback on each row of a file; a message that was taken in before counts once."""
    from fedloop_clients.importing import take_in

    task_options.check(agent.task)
    messages = agent.task.read(data, task_options.of_task(agent.task.columns))
    found = take_in(agent, messages, skip_bad=skip_bad)
    for what, count in found.skipped.items():
        console.note(f"warning: {count} rows skipped: {console.printable(what)}")
    document = {name: getattr(found, name) for name in found.__struct_fields__}
    right = "" if found.right is None else f" ({found.right} were answered rightly)"
    shown = f"{found.recorded} recorded{right}, {found.known} known already"
    console.show(document, shown, as_json=json)


def _document(status: Status) -> dict[str, object]:
    cut_short = [msgspec.to_builtins(each) | {"sentence": each.sentence} for each in status.cut_short]
    found = {name: getattr(status, name) for name in status.__struct_fields__}
    personal = None if status.personal is None else msgspec.to_builtins(status.personal) | {"sentence": status.personal.sentence}
    return found | {"cut_short": cut_short, "personal": personal, "settled": status.settled}


def _text(status: Status) -> str:
    personal = None if status.personal is None else status.personal.sentence
    fields = _document(status) | {"cut_short": len(status.cut_short), "personal": personal}
    return "\n".join([console.fields(fields), *(console.printable(each.sentence) for each in status.cut_short)])


def _summary(status: Status) -> str:
    line = f"release {status.release}, {status.examples} examples, {status.waiting} to mask, {status.unsent} to send"
    answers = ", ".join(f"{count} {outcome}" for outcome, count in sorted(status.answers.items()))
    if answers:
        line += f"; rounds: {answers}"
    if status.epsilon is not None:
        line += f"; epsilon {status.epsilon_spent:.3f} of {status.epsilon:g}"
    return console.printable(line + (f"; {status.problem}" if status.problem else ""))

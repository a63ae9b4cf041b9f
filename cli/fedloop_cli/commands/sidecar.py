"""`fedloop agent serve` and `fedloop agent chat`: a device's agent for programs that speak OpenAI's interface, and for people."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedloop_cli import console, options


def serve(
    store: options.StoreFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 11435,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages that may use it, as in http://localhost:3000; repeatable."),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Answer with another OpenAI-compatible server, as in http://127.0.0.1:11434/v1; feedback and learning stay here."
            " Its key, if it wants one, is in FEDLOOP_UPSTREAM_KEY.",
        ),
    ] = None,
    hand_releases: Annotated[
        Literal["vllm", "llama.cpp"] | None,
        typer.Option(
            help="Hand each new release to the --upstream: load it into vLLM as an adapter, or write it as a file for llama.cpp,"
            " which loads it when it is restarted.",
            show_default="none is handed over",
        ),
    ] = None,
    releases_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where releases are handed over: the upstream reads it under the same path.",
            show_default="upstream in STORE",
        ),
    ] = None,
    no_rounds: Annotated[bool, typer.Option("--no-rounds", help="Answer alone: another process takes part in rounds.")] = False,
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where base models lie.")] = None,
    base_dtype: options.BaseDtype = "auto",
    scratch_mb: options.ScratchMb = None,
    rank: options.Rank = None,
    use_case: options.UseCase = "default",
    json: options.Json = False,
) -> None:
    """Answer programs of this machine that speak OpenAI's interface, take feedback, and take part in rounds, until Ctrl-C.

    Every request needs the key, which is made at the first start in the file sidecar.key of STORE.
    """
    from fedloop_events.errors import UsageError

    if hand_releases is not None and upstream is None:
        raise UsageError("--hand-releases says to whom, and there is nobody", hint="name the server with --upstream")
    if releases_folder is not None and hand_releases is None:
        raise UsageError("--releases-folder is for --hand-releases, which is not given")
    try:
        from fedloop_clients.sidecar import access, app, handing, serving
        from fedloop_clients.sidecar.answering import OwnModel
        from fedloop_clients.sidecar.upstream import Upstream
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the sidecar needs the package {error.name}, which is not installed", hint="pip install 'fedloop[client,sidecar]'"
        ) from None
    from fedloop_clients.agent import Agent
    from fedloop_clients.device import Settings

    origins = [access.check_origin(each) for each in allow_origin or ()]
    log, blobs = options.given()
    key_file = store / access.KEY_FILE

    def listening(address: str) -> None:
        agent.links.serve_at(address)
        document = {"base_url": f"{address}/v1", "key_file": str(key_file)}
        console.show(document, lambda: console.fields(document), as_json=json)

    settings = Settings(
        use_case=use_case, model_dir=model_dir, base_dtype=base_dtype, scratch_bytes=options.in_bytes(scratch_mb), rank=rank
    )
    with Agent.open(store, log, blobs=blobs, settings=settings) as agent:
        key = access.key_of(store)
        answering = OwnModel(agent) if upstream is None else Upstream(agent, upstream, os.environ.get("FEDLOOP_UPSTREAM_KEY", ""))
        handed: AbstractContextManager[None] = nullcontext()
        if isinstance(answering, Upstream) and hand_releases is not None:
            handed = handing.handing(handing.to(hand_releases, agent, answering, releases_folder or store / "upstream"))
        served = app.create_app(agent, answering, key, origins=origins)
        with serving.listen(port) as opened:
            try:
                with handed, nullcontext() if no_rounds else serving.rounds(agent):
                    interrupted = serving.SidecarServer(served, opened, listening).serve_here()
            finally:
                answering.close()
    if interrupted:
        raise typer.Exit(130)


def chat(
    store: options.StoreFolder,
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where base models lie.")] = None,
    base_dtype: options.BaseDtype = "auto",
) -> None:
    """Talk to the device's model in this terminal; /up, /down, /fix TEXT and /retry give feedback on its last answer, which
    `fedloop agent run` publishes, masked.
    """
    from fedloop_clients.agent import Agent
    from fedloop_clients.device import Settings
    from rich.console import Console

    from fedloop_cli.conversing import Conversation

    log, blobs = options.given()
    screen = Console(highlight=False)
    with Agent.open(store, log, blobs=blobs, settings=Settings(model_dir=model_dir, base_dtype=base_dtype)) as agent:
        conversation = Conversation(agent, screen)
        conversation.help()
        try:
            while conversation.take(screen.input("[bold]> [/bold]")):
                pass
        except EOFError:
            screen.print()

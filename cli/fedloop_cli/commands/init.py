"""`fedloop init`: make what a deployment stands on, before `fedloop server init` makes the deployment itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from fedloop_cli import console, options, task_options

app = options.group(help="Make what a deployment stands on: a Kafka cluster's topics, users and rights; what Compose needs.")

USERS: Final = Path("kafka-users")


@app.command(cls=options.Command)
def kafka(
    create_user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE:NAME", help="Make a user: agent, gateway, server, auditor, operator. Can be given several times."
        ),
    ] = None,
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the users' properties files are put.")] = USERS,
    json: options.Json = False,
) -> None:
    """Make the topics of the log that --log names, and users with the rights of their roles.

    --log kafka://HOST:PORT/PREFIX?config=FILE, where FILE is an administrator's. Made again it changes nothing but what differs:
    a user who is given another role loses the rights of the old one.
    """
    from fedloop_events.errors import UsageError
    from fedloop_events.logs.kafka import KafkaLog, rights
    from fedloop_events.logs.kafka.settings import KafkaSettings

    location = options.given()[0]
    if location is None:
        raise UsageError("nothing says which cluster", hint="name it with --log kafka://HOST:PORT/PREFIX?config=FILE")
    users = [rights.User.parse(each) for each in create_user or ()]
    settings = KafkaSettings.parse(location)
    granted = rights.grant(settings, users, into) if users else []
    KafkaLog(location, create=True).close()
    rows = [
        (each.user.name, each.user.role, "new" if each.new else "there", each.added, each.removed, each.properties)
        for each in granted
    ]
    document = {
        "topics": settings.prefix,
        "brokers": settings.bootstrap,
        "users": [
            {
                "name": each.user.name,
                "role": each.user.role,
                "new": each.new,
                "rights_added": each.added,
                "rights_removed": each.removed,
                "properties": str(each.properties),
            }
            for each in granted
        ],
    }
    table = console.table(("user", "role", "", "rights added", "removed", "properties"), rows) if rows else ""
    console.show(document, f"the topics {settings.prefix}.* are on {settings.bootstrap}\n{table}".rstrip(), as_json=json)


@app.command(cls=task_options.ShapeCommand)
def compose(
    directory: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where they go.")] = Path(),
    json: options.Json = False,
) -> None:
    """Make what docker-compose.yml needs, in FOLDER (the current one): .env, secrets/ and demo-data/.

    Server and agents learn the demo's messages of --task, with the model that the task has; it goes into the images.
    Passwords and keys are random, and only you can read them. Called again it makes what is missing, and replaces nothing.
    """
    from fedloop_cli.provisioning import composing

    task = task_options.chosen()
    done = composing.compose(directory, task, task_options.of_task(task_options.shape(task)))
    document = {"env_file": str(done.env_file), "secrets": str(done.secrets), "demo": str(done.demo), "made": done.made}
    text = f"""\
made {len(done.made)} {"file" if len(done.made) == 1 else "files"} in {directory}
next  docker compose --env-file {done.env_file} up --build --detach
      (with TORCH_INDEX=<an index of torch wheels for CPUs> before it, the images are 3 GB smaller)
then  http://127.0.0.1:3000 (Grafana: admin, password in {done.secrets / "grafana" / "admin.password"})
      http://127.0.0.1:9090 (Prometheus)"""
    console.show(document, text, as_json=json)

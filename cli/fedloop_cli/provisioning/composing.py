"""What docker-compose.yml needs before its first start: secrets, certificates, what a model is made of, and the messages of the
four agents' users.

What was decided by chance is in one file, and everything else follows from it: made again, what is missing is made again as it
was, and nothing that is there is replaced (but certificates that are about to end).
"""

from __future__ import annotations

import base64
import os
import secrets
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_events.files import reason, write_private
from fedloop_tasks.table import name_of
from fedloop_tasks.task import Task
from msgspec import Struct

from fedloop_cli.demo import users
from fedloop_cli.provisioning.certificates import CA, make_ca

AGENTS: Final = ("agent-1", "agent-2", "agent-3", "agent-4")
USERS: Final = ("server", *AGENTS)
BUCKET: Final = "fedloop"
INSIDE: Final = "/var/lib/fedloop/secrets"
"""Where a service of ours finds its secrets."""
SEED: Final = 0
EXAMPLES: Final = 600
"""Of a device whose model picks an answer, as `fedloop server init` is given them; of one that writes its own `users.SPOKEN`."""
_INIT: Final = "FEDLOOP_INIT"
"""The setting that holds what the service `deployment` gives `fedloop server init`."""


class Composed(Struct, frozen=True):
    """Where things lie, and which of them were made now."""

    env_file: Path
    secrets: Path
    demo: Path
    made: list[str]


class _Chosen(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is random but the keys of certificates."""

    cluster_id: str
    grafana: str
    kafka: dict[str, str]
    """Password by user."""
    s3: dict[str, tuple[str, str]]
    """Access key and secret key by user."""


class _Folder:
    """Writes what is missing below `root`, and notes what that was."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, list[str]()

    def add(self, name: str, text: str, *, secret: bool = True) -> None:
        path = self.root / name
        if path.exists():
            return
        path.parent.mkdir(mode=0o700 if secret else 0o755, parents=True, exist_ok=True)
        write_private(path, text.encode())
        if not secret:
            path.chmod(0o644)
        self.made.append(name)


def compose(directory: Path, task: type[Task], options: Mapping[str, Any] = {}) -> Composed:
    """Make `.env`, `secrets/` and `demo-data/` in `directory`, as far as they are missing, for a deployment of that task;
    `options` are what its model is given of `Task.files` beside the demo's own.

    Raises `UsageError` if the folder cannot be written, holds something else in their place, or was made for another model, and
    for options that make no model.
    """
    found = users.invented(task, len(AGENTS), SEED)
    init = _init(task, found, {name: value for name, value in options.items() if value is not None})
    root = directory.absolute()
    if set("'\n\r") & set(str(root)):
        raise UsageError("the folder's path holds a quotation mark or a line break", hint="choose another folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        kept, demo = root / "secrets", root / "demo-data"
        kept.mkdir(mode=0o700, exist_ok=True)
        kept.chmod(0o700)
        _check_same(root / ".env", init)
        folder = _Folder(root)
        chosen = _choose(kept / "chosen.json", folder.made)
        _certify(kept, folder)
        _add_secrets(folder, chosen)
        _add_messages(folder, task, found)
        settings = {"FEDLOOP_SECRETS": str(kept), "FEDLOOP_DEMO": str(demo), "KAFKA_CLUSTER_ID": chosen.cluster_id}
        _add_settings(folder, settings | {_INIT: init, "FEDLOOP_MODEL": task.base_model})
    except OSError as error:
        raise UsageError(f"{directory} cannot be used", cause=reason(error, root / ".env")) from None
    return Composed(root / ".env", kept, demo, folder.made)


def _choose(path: Path, made: list[str]) -> _Chosen:
    """What the file holds; if there is none, it is made, whole, and of two processes the first one's holds."""
    if not path.exists():
        # Kafka's ids are 16 bytes; the first bit is 0, so that none looks like an option.
        cluster_id = bytes([secrets.randbelow(128)]) + secrets.token_bytes(15)
        chosen = _Chosen(
            base64.urlsafe_b64encode(cluster_id).rstrip(b"=").decode(),
            secrets.token_urlsafe(24),
            {user: secrets.token_urlsafe(32) for user in USERS},
            {user: (secrets.token_hex(10), secrets.token_urlsafe(32)) for user in USERS},
        )
        temporary = path.with_name(f".{path.name}.{ids.new_id()}")
        write_private(temporary, msgspec.json.encode(chosen))
        try:
            os.link(temporary, path)
            made.append(f"{path.parent.name}/{path.name}")
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Chosen)
    except msgspec.MsgspecError:
        raise UsageError(f"{path} does not hold what this command writes", hint="restore it from a backup") from None


def _certify(kept: Path, folder: _Folder) -> None:
    """The authority, whose key no service sees, and the certificates of who is called and of who sets up Kafka."""
    new = not (kept / "ca" / "ca.pem").exists()
    authority: CA = make_ca(kept / "ca")
    folder.made += ["secrets/ca/ca.pem"] if new else []
    for name in ("kafka", "blobs"):
        authority.issue(name, [name, "localhost", "127.0.0.1"], kept / name)
    authority.issue("admin", [], kept / "operator")
    certificate = authority.certificate.read_text(encoding="ascii")
    for name in ("kafka", "blobs", "operator", *USERS):
        folder.add(f"secrets/{name}/ca.pem", certificate)


def _add_secrets(folder: _Folder, chosen: _Chosen) -> None:
    for user in USERS:
        properties = _properties(_login(user, chosen.kafka[user]))
        folder.add(f"secrets/{user}/kafka.properties", properties)
        folder.add(f"secrets/operator/users/{user}.properties", properties)
        access, secret = chosen.s3[user]
        folder.add(
            f"secrets/{user}/s3.credentials", f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
        )
    admin = {
        "security.protocol": "SSL",
        "ssl.ca.location": f"{INSIDE}/ca.pem",
        "ssl.certificate.location": f"{INSIDE}/admin.pem",
        "ssl.key.location": f"{INSIDE}/admin.key",
    }
    folder.add("secrets/operator/kafka.properties", _properties(admin))
    folder.add("secrets/blobs/s3.json", msgspec.json.format(msgspec.json.encode(_identities(chosen.s3))).decode())
    folder.add("secrets/grafana/admin.password", chosen.grafana)


def _login(user: str, password: str) -> dict[str, str]:
    return {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": user,
        "sasl.password": password,
        "ssl.ca.location": f"{INSIDE}/ca.pem",
    }


def _properties(settings: Mapping[str, str]) -> str:
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _identities(keys: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """SeaweedFS's users. The server makes the bucket; agents read and write in it, and delete nothing of others by its name."""
    agent = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List")]
    return {
        "identities": [
            {
                "name": user,
                "credentials": [{"accessKey": access, "secretKey": secret}],
                "actions": ["Admin", "Read", "Write", "List"] if user == "server" else agent,
            }
            for user, (access, secret) in keys.items()
        ]
    }


def _init(task: type[Task], found: users.Users, options: Mapping[str, Any]) -> str:
    """What `fedloop server init` is given, in words of a shell. Raises `UsageError` for options that make no model."""
    files = task.files_of(found.material)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        task.material({**{Path(name).stem: Path(folder) / name for name in files}, **options})
    given: dict[str, Any] = {Path(name).stem: f"/demo/{name}" for name in files}
    given |= {**found.material.shape, **options, "examples": users.SPOKEN if task.speaks else EXAMPLES}
    words = ["--task", name_of(task), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    if any(set("'$\n\r") & set(word) for word in words):
        raise UsageError("an option holds a character that has a meaning in .env", hint="leave out quotation marks and $")
    return shlex.join(words)


def _check_same(path: Path, init: str) -> None:
    """Raises `UsageError` if the folder was made for another model: its deployment would not be made anew."""
    known = _settings(path).get(_INIT, "").strip("'")
    if known and known != init:
        raise UsageError(
            f"{path.parent} was made with `{known}`, and now it would be `{init}`",
            hint="give the same options again, or choose another folder",
        )


def _add_messages(folder: _Folder, task: type[Task], found: users.Users) -> None:
    """Each agent's share of the demo's corpus; to the server what a model is made from, the held-out messages among it."""
    files = task.files_of(found.material)
    for name, text in files.items():
        folder.add(f"demo-data/server/{name}", text, secret=False)
    suffix = next(Path(name).suffix for name in files if Path(name).stem == "test")
    for agent, share in zip(AGENTS, found.devices, strict=True):
        folder.add(f"demo-data/{agent}/messages{suffix}", task.written(share), secret=False)


def _settings(path: Path) -> dict[str, str]:
    """What the file `.env` has, as it is written there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name.strip().removeprefix("export "): value for name, value in pairs}


def _add_settings(folder: _Folder, settings: Mapping[str, str]) -> None:
    """Each setting that `.env` does not have; what it has stays."""
    path = folder.root / ".env"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Read by Docker Compose. Made by `fedloop init compose`.\n"
    known = _settings(path)
    lines = [f"{key}='{value}'\n" for key, value in settings.items() if key not in known]
    if lines:
        write_private(path, (text + "\n" * (not text.endswith("\n")) + "".join(lines)).encode())
        folder.made.append(".env")

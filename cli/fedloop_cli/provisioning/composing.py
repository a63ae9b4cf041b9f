"""What docker-compose.yml needs before its first start: secrets, certificates, and the messages of the four agents' users.

What was decided by chance is in one file, and everything else follows from it: made again, what is missing is made again as it
was, and nothing that is there is replaced (but certificates that are about to end).
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_events.files import reason, write_private
from fedloop_tasks.table import DEFAULT, task_named
from msgspec import Struct

from fedloop_cli.demo import users
from fedloop_cli.provisioning.certificates import CA, make_ca

AGENTS: Final = ("agent-1", "agent-2", "agent-3", "agent-4")
USERS: Final = ("server", *AGENTS)
BUCKET: Final = "fedloop"
INSIDE: Final = "/var/lib/fedloop/secrets"
"""Where a service of ours finds its secrets."""
SEED: Final = 0


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


def compose(directory: Path) -> Composed:
    """Make `.env`, `secrets/` and `demo-data/` in `directory`, as far as they are missing.

    Raises `UsageError` if the folder cannot be written, or holds something else in their place.
    """
    root = directory.absolute()
    if set("'\n\r") & set(str(root)):
        raise UsageError("the folder's path holds a quotation mark or a line break", hint="choose another folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        kept, demo = root / "secrets", root / "demo-data"
        kept.mkdir(mode=0o700, exist_ok=True)
        kept.chmod(0o700)
        folder = _Folder(root)
        chosen = _choose(kept / "chosen.json", folder.made)
        _certify(kept, folder)
        _add_secrets(folder, chosen)
        _add_messages(folder)
        _add_settings(folder, {"FEDLOOP_SECRETS": str(kept), "FEDLOOP_DEMO": str(demo), "KAFKA_CLUSTER_ID": chosen.cluster_id})
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


def _add_messages(folder: _Folder) -> None:
    """Each agent's share of the demo's corpus; to the server what a model is made from, the held-out messages among it."""
    task = task_named(DEFAULT)  # docker-compose.yml makes its deployment, with the files of that task
    found = users.invented(task, len(AGENTS), SEED)
    for name, text in task.files_of(found.material).items():
        folder.add(f"demo-data/server/{name}", text, secret=False)
    for agent, share in zip(AGENTS, found.devices, strict=True):
        folder.add(f"demo-data/{agent}/messages.csv", task.written(share), secret=False)


def _add_settings(folder: _Folder, settings: Mapping[str, str]) -> None:
    """Each setting that `.env` does not have; what it has stays."""
    path = folder.root / ".env"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Read by Docker Compose. Made by `fedloop init compose`.\n"
    known = {line.split("=", 1)[0].strip().removeprefix("export ") for line in text.splitlines() if "=" in line}
    lines = [f"{key}='{value}'\n" for key, value in settings.items() if key not in known]
    if lines:
        write_private(path, (text + "\n" * (not text.endswith("\n")) + "".join(lines)).encode())
        folder.made.append(".env")

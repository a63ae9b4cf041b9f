"""Starts services of a compose file through the Docker engine alone, for machines that have no Compose.

It knows what docker-compose.yml uses, and nothing else: an unknown key is an error, so that no test passes without it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import docker  # type: ignore[import-untyped]
import yaml

Service = dict[str, Any]
_KNOWN: Final = {
    *("image", "build", "environment", "read_only", "cap_drop", "cap_add", "security_opt", "tmpfs", "init", "logging"),
    *("restart", "user", "network_mode", "networks", "entrypoint", "command", "healthcheck", "volumes", "depends_on", "ports"),
    *("stop_grace_period", "working_dir"),
}
_VARIABLE: Final = re.compile(r"\$(?:(\$)|\{([A-Z_]+)(?:(:[?-])([^}]*))?\})")
_UNITS: Final = {"s": 1_000_000_000, "m": 60_000_000_000}


class MissingError(Exception):
    """A variable without which Compose refuses the file."""


class FailedError(Exception):
    """A service ended, or never became what others wait for; with the end of what it said."""


def load(path: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The file, its variables replaced. Raises `MissingError` with the message of `${NAME:?message}`."""

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: _value(match, environment), value)
        if isinstance(value, list):
            return [filled(each) for each in value]
        return {key: filled(each) for key, each in value.items()} if isinstance(value, dict) else value

    found: dict[str, Any] = filled(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def dotenv(path: Path) -> dict[str, str]:
    """The settings of an `.env` file whose values are quoted once."""
    lines = (line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    return {name: value.strip("'") for name, value in lines}


def _value(match: re.Match[str], environment: Mapping[str, str]) -> str:
    escaped, name, kind, word = match.groups()
    if escaped:
        return "$"
    value = environment.get(name, "")
    if not value and kind == ":?":
        raise MissingError(f"{name}: {word}")
    return value or (word if kind == ":-" else "")


class Stack:
    """Containers, networks and volumes of one project, all removed at the end. A context manager."""

    def __init__(self, document: Mapping[str, Any], project: str, root: Path) -> None:
        self.services: dict[str, Service] = document["services"]
        self._networks: dict[str, Any] = document["networks"]
        self._project, self._root = project, root
        self._docker = docker.from_env(timeout=120)
        self._containers: dict[str, Any] = {}
        unknown = {f"{name}.{key}" for name, each in self.services.items() for key in set(each) - _KNOWN}
        assert not unknown, f"compose_run does not know {sorted(unknown)}"

    def __enter__(self) -> Stack:
        for name, options in self._networks.items():
            self._docker.networks.create(self._named(name), internal=bool((options or {}).get("internal")), labels=self._labels)
        return self

    def __exit__(self, *_: object) -> None:
        chosen = {"label": f"fedloop-test={self._project}"}
        for container in self._docker.containers.list(all=True, filters=chosen):
            container.remove(force=True, v=True)
        for network in self._docker.networks.list(filters=chosen):
            network.remove()
        for volume in self._docker.volumes.list(filters=chosen):
            volume.remove(force=True)
        self._docker.close()

    def up(self, names: Iterable[str], deadline_s: float) -> None:
        """Start the services and all that they depend on, each when what it waits for is as it should be."""
        deadline = time.monotonic() + deadline_s
        for name in names:
            if name not in self._containers:
                depends: dict[str, Any] = self.services[name].get("depends_on", {})
                self.up(depends, deadline - time.monotonic())
                for needed, how in depends.items():
                    self.wait(needed, how["condition"], deadline - time.monotonic())
                self._start(name)

    def wait(self, name: str, condition: str, timeout_s: float) -> None:
        """Until a service is healthy, or has ended well. Raises `FailedError`."""
        deadline = time.monotonic() + timeout_s
        once = condition == "service_completed_successfully"
        while not self._fulfilled(name, once):
            if time.monotonic() > deadline:
                raise FailedError(f"{name}: not {condition} in time\n{self.logs(name)}")
            time.sleep(0.3)

    def _fulfilled(self, name: str, once: bool) -> bool:
        container = self._containers[name]
        container.reload()
        state = container.attrs["State"]
        if state["Status"] == "exited" and not (once and state["ExitCode"] == 0):
            raise FailedError(f"{name} ended with {state['ExitCode']}\n{self.logs(name)}")
        if once:
            return bool(state["Status"] == "exited")
        return bool(state.get("Health", {}).get("Status") == "healthy")

    def logs(self, name: str) -> str:
        text: str = self._containers[name].logs(tail=40).decode(errors="replace")
        return text

    def run(self, name: str, command: list[str]) -> tuple[int, str]:
        """A command in a running container: its exit status and what it printed."""
        status, output = self._containers[name].exec_run(command)
        return int(status), output.decode(errors="replace")

    def stop(self, name: str) -> None:
        self._containers[name].stop(timeout=20)

    def kill(self, name: str) -> None:
        self._containers[name].kill()

    def start(self, name: str) -> None:
        """Start again a container that has ended."""
        self._containers[name].start()

    @property
    def _labels(self) -> dict[str, str]:
        return {"fedloop-test": self._project}

    def _named(self, name: str) -> str:
        return f"{self._project}-{name}"

    def _start(self, name: str) -> None:
        service = self.services[name]
        networks: list[str] = service.get("networks", [])
        options: dict[str, Any] = {
            key: service[key] for key in ("environment", "read_only", "cap_drop", "init", "user") if key in service
        }
        options |= {
            key: service[key] for key in ("cap_add", "security_opt", "entrypoint", "command", "working_dir") if key in service
        }
        if networks:
            options["networking_config"] = {
                self._named(each): self._docker.api.create_endpoint_config(aliases=[name]) for each in networks[:1]
            }
            options["network"] = self._named(networks[0])
        else:
            options["network_mode"] = service["network_mode"]
        container = self._docker.containers.create(
            service["image"],
            name=self._named(name),
            labels=self._labels,
            tmpfs=dict(each.split(":", 1) for each in service["tmpfs"]),
            volumes=[self._volume(each) for each in service.get("volumes", [])],
            healthcheck=_healthcheck(service.get("healthcheck")),
            **options,
        )
        for each in networks[1:]:
            self._docker.networks.get(self._named(each)).connect(container, aliases=[name])
        self._containers[name] = container
        container.start()

    def _volume(self, text: str) -> str:
        source, _, rest = text.partition(":")
        if source.startswith("./"):
            return f"{self._root / source}:{rest}"
        if source.startswith("/"):
            return text
        self._docker.volumes.create(self._named(source), labels=self._labels)
        return f"{self._named(source)}:{rest}"


def _healthcheck(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    if found.get("disable"):
        return {"test": ["NONE"]}
    times = {
        key: int(found[key][:-1]) * _UNITS[found[key][-1]] for key in ("interval", "timeout", "start_period") if key in found
    }
    return {"test": found["test"], **times, **({"retries": found["retries"]} if "retries" in found else {})}

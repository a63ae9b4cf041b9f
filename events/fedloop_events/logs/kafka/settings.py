"""Where a Kafka log is and how it is reached: `kafka://HOST:PORT[,HOST:PORT…][/PREFIX][?config=FILE]`.

The file holds librdkafka properties, one `key=value` a line, as `kcat -F` takes it. What would weaken the connection is refused:
passwords are sent, and events read, over TLS alone, except on the machine itself.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

from msgspec import Struct, field

from fedloop_events.errors import UsageError

DEFAULT_PREFIX: Final = "fedloop"
READER_GROUP: Final = "reader"
"""The consumer group that readers name, after the prefix, and never join."""
_PREFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_SSL")
_MECHANISMS: Final = ("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN")
_ALLOWED: Final = frozenset(
    {
        "broker.address.family",
        "client.id",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.password",
        "sasl.username",
        "security.protocol",
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.endpoint.identification.algorithm",
        "ssl.key.location",
        "ssl.key.password",
    }
)


class KafkaSettings(Struct, frozen=True):
    """A parsed location. `properties` may hold a password: they are for librdkafka alone, and no error shows a value."""

    bootstrap: str
    prefix: str = DEFAULT_PREFIX
    properties: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises `UsageError` for a URL, a file or a property that is malformed or unsafe."""
        try:
            parts = urlsplit(url)
            query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError as error:
            raise UsageError("a Kafka log's URL is malformed", cause=str(error)) from None
        if "@" in parts.netloc:
            raise UsageError("a Kafka log's URL holds no user and no password", hint="put them into a file: ?config=FILE")
        if parts.scheme != "kafka" or parts.fragment:
            raise UsageError(f"{url!r} is no kafka://HOST:PORT/PREFIX")
        hosts = [_host(each, url) for each in parts.netloc.split(",")]
        prefix = parts.path.strip("/") or DEFAULT_PREFIX
        if _PREFIX.fullmatch(prefix) is None:
            raise UsageError(
                f"{prefix!r} cannot begin the names of topics",
                hint="use 1 to 80 ASCII letters, digits, - or _, beginning with a letter or digit",
            )
        files = query.pop("config", [])
        if query or len(files) > 1:
            raise UsageError(f"{url!r} asks for more than config=FILE")
        properties = read_properties(Path(files[0])) if files else {}
        _check(properties, hosts)
        return cls(parts.netloc, prefix, properties)

    def client(self) -> dict[str, str | int | bool]:
        """librdkafka's configuration, common to producers, consumers and admins."""
        return {
            "bootstrap.servers": self.bootstrap,
            "client.id": "fedloop",
            "log_level": 2,
            "socket.timeout.ms": 10_000,  # a broker that hangs is left for the next leader within `timeout_s`
            **self.properties,
        }

    def topic(self, name: str) -> str:
        """A topic's name on the cluster."""
        return f"{self.prefix}.{name}"


def read_properties(path: Path) -> dict[str, str]:
    """The properties in a file. Raises `UsageError` for one that cannot be read or that is not allowed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the Kafka properties {path} cannot be read", cause=str(error)) from None
    properties: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key in properties:
            raise UsageError(f"line {number} of {path} is no key=value, or the key's second one")
        if key not in _ALLOWED:
            raise UsageError(f"{path} sets {key!r}, which is not allowed", hint=f"allowed are {', '.join(sorted(_ALLOWED))}")
        properties[key] = value
    return properties


def _host(each: str, url: str) -> str:
    host, colon, port = each.rpartition(":")
    if not colon or _HOST.fullmatch(host) is None or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{url!r} does not name its brokers as HOST:PORT", hint="for example kafka://127.0.0.1:9092")
    return host.strip("[]")


def _check(properties: dict[str, str], hosts: list[str]) -> None:
    protocol = properties.get("security.protocol", "PLAINTEXT").upper()
    mechanism = properties.get("sasl.mechanism", properties.get("sasl.mechanisms", ""))
    if protocol not in _PROTOCOLS:
        raise UsageError(
            f"security.protocol {protocol} is not allowed",
            cause="it would send what proves the password without TLS (CVE-2024-56128)" if protocol == "SASL_PLAINTEXT" else "",
            hint=f"allowed are {', '.join(_PROTOCOLS)}",
        )
    if protocol == "SASL_SSL" and mechanism not in _MECHANISMS:
        raise UsageError(f"sasl.mechanism {mechanism!r} is not allowed", hint=f"allowed are {', '.join(_MECHANISMS)}")
    if protocol != "SASL_SSL" and any(key.startswith("sasl.") for key in properties):
        raise UsageError("a SASL user without security.protocol=SASL_SSL would be ignored", hint="set security.protocol=SASL_SSL")
    if properties.get("ssl.endpoint.identification.algorithm", "https") != "https":
        raise UsageError("the broker's name must be checked against its certificate", hint="drop ssl.endpoint.identification…")
    if protocol == "PLAINTEXT" and not all(map(_loopback, hosts)):
        raise UsageError(
            "a broker on another machine is reached over TLS alone",
            hint="put security.protocol=SASL_SSL, the user and ssl.ca.location into a file: ?config=FILE",
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

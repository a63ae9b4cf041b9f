"""The event types for everybody else: a JSON Schema for each, and an AsyncAPI 3.0 document of the topics.

`python -m fedloop_events.schemas --write` makes the files beside this package anew; `--check` exits 1 if they are stale.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from fedloop_events import topics, types

FOLDER: Final = Path(__file__).resolve().parent.parent
_KAFKA_BINDING: Final = "0.5.0"


def json_schema(payload: type, type_name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one type's `data`, under the id that `dataschema` names."""
    schema = msgspec.json.schema(payload)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:fedloop:schema:{type_name}",
        **_portable(schema),
    }


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3.0 document: channels are the topics, messages the event types in CloudEvents' binary mode."""
    by_topic = {topic: {each.__name__: each for each in types.CURRENT.values() if each.topic == topic} for topic in topics.ALL}
    messages = {name: payload for each in by_topic.values() for name, payload in each.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Fedloop",
            "version": "1",
            "description": "The event log of Fedloop. Every event is a CloudEvents 1.0 event in binary mode; data is JSON.",
        },
        "defaultContentType": "application/json",
        "channels": {
            topic: {
                "address": topic,
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in by_topic[topic]},
                "bindings": {"kafka": _binding(topics.DECLARED[topic])},
            }
            for topic in topics.ALL
        },
        "operations": {
            f"{verb}-{topic}": {"action": action, "channel": {"$ref": f"#/channels/{topic}"}}
            for topic in topics.ALL
            for verb, action in (("append", "send"), ("read", "receive"))
        },
        "components": {
            "messages": {name: _message(payload) for name, payload in messages.items()},
            "schemas": {"headers": _HEADERS},
        },
    }


def _binding(topic: topics.Topic) -> dict[str, Any]:
    """https://github.com/asyncapi/bindings/tree/master/kafka, version 0.5.0; the deployment's prefix comes before the name."""
    settings = {"cleanup.policy": ["delete"], "retention.ms": topic.retention_ms, "retention.bytes": topics.KEPT}
    return {
        "topic": topic.name,
        "partitions": topic.partitions,
        "topicConfiguration": settings,
        "bindingVersion": _KAFKA_BINDING,
    }


def files() -> dict[Path, str]:
    """Every generated file, relative to `FOLDER`, with its text."""
    named: dict[str, type] = {**types.CURRENT, **types.OLDER}
    made = {
        Path("schemas") / f"{name}.json": json.dumps(json_schema(payload, name), indent=2, ensure_ascii=False) + "\n"
        for name, payload in named.items()
    }
    header = "# Made by `python -m fedloop_events.schemas --write`: do not edit.\n"
    return made | {Path("asyncapi.yaml"): header + "\n".join(_yaml(asyncapi())) + "\n"}


def stale(folder: Path = FOLDER) -> list[Path]:
    """The generated files in `folder` that are absent, different, or left over."""
    made = files()
    there = {path.relative_to(folder) for path in (folder / "schemas").glob("*.json")}
    different = [
        path for path, text in made.items() if not (folder / path).is_file() or (folder / path).read_text("utf-8") != text
    ]
    return sorted([*different, *(there - made.keys())])


def write(folder: Path = FOLDER) -> None:
    for path in stale(folder):
        (folder / path).unlink(missing_ok=True)
    for path, text in files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, "utf-8")


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        write()
        return 0
    if arguments == ["--check"]:
        wrong = stale()
        if wrong:
            names = ", ".join(map(str, wrong))
            print(f"events/ is stale ({names}): run python -m fedloop_events.schemas --write", file=sys.stderr)
        return 1 if wrong else 0
    print("usage: python -m fedloop_events.schemas --write | --check", file=sys.stderr)
    return 2


_HEADERS: Final[dict[str, Any]] = {
    "type": "object",
    "description": "CloudEvents attributes, as the Kafka protocol binding names them in binary mode.",
    "required": ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_dataschema", "content-type"],
    "properties": {
        "ce_specversion": {"const": "1.0"},
        "ce_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "ce_source": {"type": "string"},
        "ce_type": {"type": "string"},
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_dataschema": {"type": "string"},
        "ce_partitionkey": {"type": "string"},
        "ce_fedlooptopic": {"type": "string"},
        "ce_dssematerial": {"type": "string", "contentEncoding": "base64"},
        "content-type": {"const": "application/json"},
    },
}


def _message(payload: type[types.Payload]) -> dict[str, Any]:
    return {
        "name": payload.type_name,
        "title": payload.__name__,
        "summary": (inspect.getdoc(payload) or "").split("\n\n")[0].replace("\n", " "),
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/headers"},
        "payload": {"$ref": f"./schemas/{payload.type_name}.json"},
        "bindings": {"kafka": {"key": {"type": "string"}, "bindingVersion": _KAFKA_BINDING}},
    }


def _portable(schema: Any) -> Any:
    """`schema` with the anchors of its patterns as ECMA 262, JSON Schema's dialect, writes them."""
    if isinstance(schema, Mapping):
        return {
            key: value.replace(r"\A", "^").replace(r"\Z", "$") if key == "pattern" else _portable(value)
            for key, value in schema.items()
        }
    return [_portable(value) for value in schema] if isinstance(schema, list) else schema


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Block style of mappings and lists; scalars and empty collections are JSON, which YAML 1.2 contains."""
    lines: list[str] = []
    items = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in items:
        head = f"{indent}- " if key is None else f"{indent}{json.dumps(key) if not str(key).isidentifier() else key}:"
        if isinstance(item, (Mapping, list)) and item:
            lines += [head.rstrip(), *_yaml(item, indent + "  ")]
        else:
            lines.append(f"{head.rstrip()} {json.dumps(item, ensure_ascii=False)}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

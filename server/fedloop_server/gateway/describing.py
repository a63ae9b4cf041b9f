"""The OpenAPI document of the gateway: what it takes, and every answer it can give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedloop_events import topics
from fedloop_events.envelope import CONTENT_TYPE, SPECVERSION
from fedloop_events.logs.http import cloudevents, signing

from fedloop_server.gateway.limits import Limits
from fedloop_server.gateway.problems import CODES, MEDIA_TYPE, PREFIX

_Document = dict[str, Any]

_ALWAYS: Final = ("malformed", "uri-too-long", "headers", "rate", "log-away", "busy")
_SIGNED: Final = ("unsigned", "signature", "clock", "replayed", "unknown-client", "revoked", "too-large", "digest", "slow")
_SIGNATURE_HEADERS: Final = {
    "Content-Digest": "RFC 9530: `sha-256=:…:` of the content, also of an empty one.",
    "Signature-Input": f'RFC 9421, one signature over "@method", "@authority", "@path", "@query" and "content-digest", with '
    f'created, expires, nonce, keyid and tag="{signing.TAG}".',
    "Signature": "RFC 9421, ed25519, by the key of keyid.",
}


def document(limits: Limits) -> _Document:
    """OpenAPI 3.1, for a gateway with these limits."""
    page = _answer("Events", "application/json", "Page")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fedloop gateway",
            "version": "1",
            "description": "A deployment's log and blobs for devices. Requests are signed (RFC 9421); errors are RFC 9457's.",
        },
        "paths": {
            "/v1/events": {
                "post": _operation(
                    "Append events, all or none; 204 when they are durable. An event that is there already counts once.",
                    {"204": {"description": "They are in the log."}},
                    (*_SIGNED, "media-type", "forbidden", "event", "name-taken"),
                    body={cloudevents.BATCH_TYPE: {"schema": _batch(limits)}},
                ),
                "get": _operation(
                    "Read the events that the caller may see, after a position, waiting for the first one.",
                    {"200": page | {"content": page["content"] | {"text/event-stream": {"schema": {"type": "string"}}}}},
                    (*_SIGNED, "polls"),
                    parameters=_page_parameters(limits),
                ),
            },
            "/v1/end": {
                "get": _operation(
                    "The position after everything in the log.",
                    {"200": _answer("The position", "application/json", "End")},
                    _SIGNED,
                )
            },
            "/v1/blobs/{sha256}": {
                "parameters": [
                    {"name": "sha256", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"}}
                ],
                "put": _operation(
                    "Store a blob that an instruction asks for under its SHA-256, which its Content-Digest names too.",
                    {"204": {"description": "It is in the store, whole."}},
                    (*_SIGNED, "not-asked", "no-length", "quota", "not-found"),
                    body={"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
                ),
                "get": _operation(
                    "The bytes of a blob that the caller may read.", {"200": _blob(body=True)}, (*_SIGNED, "not-found")
                ),
                "head": _operation(
                    "The size of a blob that the caller may read.", {"200": _blob(body=False)}, (*_SIGNED, "not-found")
                ),
            },
            "/v1/deployment": {
                "get": _operation(
                    "The event that created the deployment; not signed, for everybody.", {"200": page}, (), signed=False
                )
            },
            "/healthz": {
                "get": _operation(
                    "Whether the gateway can follow the log; not signed.",
                    {"200": _answer("It can.", "application/json", "Health")},
                    (),
                    signed=False,
                )
            },
        },
        "components": {"schemas": _schemas()},
    }


def _operation(
    summary: str,
    answers: _Document,
    refusals: Iterable[str],
    *,
    parameters: Iterable[_Document] = (),
    body: _Document | None = None,
    signed: bool = True,
) -> _Document:
    by_status: dict[str, list[str]] = {}
    for code in dict.fromkeys((*_ALWAYS, *refusals)):
        by_status.setdefault(str(CODES[code][0]), []).append(code)
    headers = _SIGNATURE_HEADERS if signed else {}
    described: _Document = {
        "summary": summary,
        "parameters": [
            *parameters,
            *(
                {"name": name, "in": "header", "required": True, "description": text, "schema": {"type": "string"}}
                for name, text in headers.items()
            ),
        ],
        "responses": answers | {status: _refusal(codes) for status, codes in sorted(by_status.items())},
    }
    if body is not None:
        described["requestBody"] = {"required": True, "content": body}
    return described


def _refusal(codes: list[str]) -> _Document:
    found: _Document = {
        "description": "; ".join(f"`{code}`: {CODES[code][1]}" for code in codes),
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if CODES[codes[0]][0] in {429, 503}:
        found["headers"] = {
            "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}
        }
    return found


def _answer(description: str, media_type: str, schema: str) -> _Document:
    return {"description": description, "content": {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _blob(*, body: bool) -> _Document:
    described: _Document = {"description": "The blob; Content-Length is its size."}
    if body:
        described["content"] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return described


def _page_parameters(limits: Limits) -> list[_Document]:
    def query(name: str, text: str, schema: Mapping[str, object]) -> _Document:
        return {"name": name, "in": "query", "required": False, "description": text, "schema": dict(schema)}

    one = "|".join(topics.ALL)
    return [
        query("topics", "Topics with commas between; all by default.", {"type": "string", "pattern": f"^({one})(,({one}))*$"}),
        query(
            "after",
            "The position of an earlier answer: STREAM:OFFSET,…",
            {"type": "string", "pattern": "^([A-Za-z0-9._-]{1,100}:[0-9]{1,18}(,[A-Za-z0-9._-]{1,100}:[0-9]{1,18})*)?$"},
        ),
        query("limit", "Events at most.", {"type": "integer", "minimum": 1, "maximum": limits.page_events}),
        query("wait_s", "Seconds to wait for a first event.", {"type": "number", "minimum": 0, "maximum": limits.longest_wait_s}),
    ]


def _batch(limits: Limits) -> _Document:
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.batch_events,
        "items": {"$ref": "#/components/schemas/CloudEvent"},
    }


def _schemas() -> _Document:
    text = {"type": "string"}
    position = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}
    event = {
        "type": "object",
        "description": "CloudEvents 1.0 in JSON; the types and their data are described by the AsyncAPI document.",
        "required": [
            "specversion",
            "id",
            "source",
            "type",
            "time",
            "datacontenttype",
            "dataschema",
            "fedlooptopic",
            "partitionkey",
        ],
        "properties": {
            "specversion": {"const": SPECVERSION},
            "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "source": text,
            "type": text,
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"const": CONTENT_TYPE},
            "dataschema": text,
            "data": {},
            "data_base64": text | {"description": "In place of data, where it is not JSON."},
            "dssematerial": text | {"description": "The signature: a DSSE envelope, base64."},
            "fedlooptopic": {"enum": list(topics.ALL)},
            "partitionkey": text,
            "fedloopstream": text | {"description": "Of what was read: the log's stream."},
            "fedloopoffset": text | {"pattern": "^[0-9]*$", "description": "Of what was read: its place there."},
            "recordedtime": text | {"description": "Of what was read: when the log took it."},
        },
        "additionalProperties": False,
    }
    return {
        "CloudEvent": event,
        "Page": {
            "type": "object",
            "required": ["events", "position", "more"],
            "properties": {
                "events": {"type": "array", "items": {"$ref": "#/components/schemas/CloudEvent"}},
                "position": position,
                "more": {"type": "boolean"},
            },
            "additionalProperties": False,
        },
        "End": {"type": "object", "required": ["position"], "properties": {"position": position}, "additionalProperties": False},
        "Health": {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}},
        "Problem": {
            "type": "object",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {"enum": [PREFIX + code for code in CODES]},
                "title": text,
                "status": {"type": "integer"},
                "detail": text,
            },
            "additionalProperties": False,
        },
    }

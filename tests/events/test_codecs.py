"""Payloads and envelopes: what is written is read, for every type, and nothing else is."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
import samples
import yaml
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from fedloop_events import envelope, schemas, topics, types
from fedloop_events.errors import InvalidEventError
from fedloop_events.logs.port import Position
from fedloop_events.masked import MaskedText
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect as structure

TEXT = st.characters(codec="utf-8")


def values(kind: structure.Type) -> st.SearchStrategy[object]:
    """JSON values that a msgspec type accepts."""
    match kind:
        case structure.StructType():
            fields = {field.encode_name: values(field.type) for field in kind.fields if field.required}
            optional = {field.encode_name: values(field.type) for field in kind.fields if not field.required}
            if kind.tag_field is not None:
                fields[kind.tag_field] = st.just(kind.tag)
            return st.fixed_dictionaries(fields, optional=optional)
        case structure.StrType(pattern=str(pattern)):
            lengths = (kind.min_length or 0, kind.max_length or 80)
            return st.from_regex(pattern, fullmatch=True).filter(lambda text: lengths[0] <= len(text) <= lengths[1])
        case structure.StrType():
            return st.text(TEXT, min_size=kind.min_length or 0, max_size=min(kind.max_length or 30, 40))
        case structure.IntType():
            return st.integers(-(2**53) + 1 if kind.ge is None else kind.ge, 2**53 - 1 if kind.le is None else kind.le)
        case structure.FloatType():
            low = kind.gt if kind.ge is None else kind.ge
            high = kind.lt if kind.le is None else kind.le
            return st.floats(
                low, high, exclude_min=kind.gt is not None, exclude_max=kind.lt is not None, allow_nan=False, allow_infinity=False
            )
        case structure.BoolType():
            return st.booleans()
        case structure.NoneType():
            return st.none()
        case structure.LiteralType():
            return st.sampled_from(kind.values)
        case structure.ListType():
            return st.lists(values(kind.item_type), max_size=3)
        case structure.DictType():
            keys = values(kind.key_type)
            return st.dictionaries(keys, values(kind.value_type), max_size=3)
        case structure.UnionType():
            return st.one_of([values(option) for option in kind.types])
        case _:
            raise NotImplementedError(kind)


@pytest.mark.parametrize("payload_type", list(types.CURRENT.values()), ids=lambda payload_type: payload_type.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_type_comes_back_equal_and_fits_its_schema(payload_type: type[types.Payload], data: st.DataObject) -> None:
    payload = msgspec.convert(data.draw(values(structure.type_info(payload_type))), payload_type)
    event = envelope.encode(payload, id="0" * 32, time_s=1)
    assert envelope.decode(event) == payload
    assert envelope.expect(event, payload_type) == payload
    jsonschema.validate(json.loads(event.data), schemas.json_schema(payload_type, payload_type.type_name))


@pytest.mark.parametrize("older", list(types.OLDER.values()), ids=lambda older: older.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_older_version_is_upcast_to_the_newest(older: type[types.Older], data: st.DataObject) -> None:
    found = data.draw(values(structure.type_info(older)))
    event = samples.record(samples.event(samples.feedback()), 1)
    payload = envelope.decode(msgspec.structs.replace(event, type=older.type_name, data=msgspec.json.encode(found)))
    newest = types.newest(older.type_name)
    assert newest is not None
    assert isinstance(payload, newest)
    again = envelope.encode(payload, id=event.id, time_s=1)
    assert envelope.decode(again) == payload


def test_a_model_of_version_1_is_a_classifier_and_an_accuracy_of_version_1_leads() -> None:
    spec = {
        "base_model": "m",
        "base_sha256": "0" * 64,
        "labels": ["a", "b"],
        "rank": 8,
        "alpha": 4.0,
        "targets": ["q"],
        "layers": 1,
    }
    older: dict[str, dict[str, object]] = {
        "model.registered": {"spec": spec},
        "release.evaluated": {"epoch": 1, "release": "0001-x", "accuracy": 0.5, "examples": 9, "dataset_sha256": "1" * 64},
    }
    event = samples.event(samples.feedback())
    registered, evaluated = (
        envelope.decode(
            msgspec.structs.replace(
                event, type=f"io.fedloop.{name}.v1", data=json.dumps({"origin": "o", "model": "default"} | fields).encode()
            )
        )
        for name, fields in older.items()
    )
    assert isinstance(registered, types.ModelRegistered)
    assert msgspec.to_builtins(registered.spec) == {"task": "classification"} | spec
    assert isinstance(evaluated, types.ReleaseEvaluated)
    assert (evaluated.metrics, evaluated.leading, evaluated.examples) == ({"accuracy": 0.5}, "accuracy", 9)
    assert (evaluated.higher_is_better, evaluated.scores) == (True, None)


def test_an_evaluation_of_version_2_is_better_when_higher_and_has_no_scores() -> None:
    fields = {"metrics": {"loss": 1.5, "accuracy": 0.5}, "leading": "loss", "examples": 9, "dataset_sha256": "1" * 64}
    data = {"origin": "o", "model": "default", "epoch": 1, "release": "0001-x"} | fields
    event = msgspec.structs.replace(samples.event(samples.feedback()), type="io.fedloop.release.evaluated.v2")
    found = envelope.decode(msgspec.structs.replace(event, data=json.dumps(data).encode()))
    assert found == types.ReleaseEvaluated(
        "o", "default", 1, "0001-x", {"loss": 1.5, "accuracy": 0.5}, "loss", 9, "1" * 64, higher_is_better=True, scores=None
    )
    with pytest.raises(InvalidEventError):
        envelope.decode(msgspec.structs.replace(event, data=json.dumps(data | {"metrics": {"loss": None}}).encode()))


def test_type_names_and_topics_are_well_formed_and_unique() -> None:
    named = [payload_type.type_name for payload_type in types.CURRENT.values()]
    assert len(set(named)) == len(named)
    assert all(payload_type.topic in topics.ALL for payload_type in types.CURRENT.values())


def changed(**fields: object) -> bytes:
    return json.dumps(json.loads(samples.event(samples.feedback()).data) | fields).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 50_000,
        changed(more=1),
        changed(seq=-1),
        changed(seq=2**53),
        changed(seq=1.5),
        changed(seq="1"),
        changed(seq=True),
        changed(client_id="a/b"),
        changed(client_id="a\n"),
        changed(client_id=""),
        changed(client_id="a" * 81),
        changed(rating=6),
        changed(thumb="sideways"),
        changed(text="raw words"),
        changed(text={"text": "x" * 12_001, "counts": {}}),
        changed(text={"text": "x", "counts": {"PERSON": 0}}),
        changed(text={"text": "x", "raw": "y"}),
        changed(rating=float("nan")),
        samples.event(samples.feedback()).data.replace(b'"seq":0', b'"seq":' + b"9" * 5000),
        samples.event(samples.feedback()).data + b"{}",
    ],
    ids=range(25),
)
def test_data_that_is_not_exactly_its_type_is_refused(data: bytes) -> None:
    event = msgspec.structs.replace(samples.event(samples.feedback()), data=data)
    with pytest.raises(InvalidEventError, match="not a valid") as caught:
        envelope.decode(event)
    assert "raw words" not in str(caught.value)


def test_an_unknown_or_newer_type_is_none_and_another_one_is_not_expected() -> None:
    event = samples.event(samples.feedback())
    assert envelope.decode(msgspec.structs.replace(event, type="io.fedloop.feedback.recorded.v4")) is None
    with pytest.raises(InvalidEventError, match="not a"):
        envelope.expect(event, types.EpochStarted)


def test_masked_text_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError, match="masker alone"):
        MaskedText("raw words", {})


def test_a_payload_that_is_too_large_is_refused() -> None:
    payload = types.NodesListed(origin="o", epoch=1, run_id="main", step=0, node_ids=["1" * 20] * 3000)
    with pytest.raises(InvalidEventError, match="larger than"):
        samples.event(payload)


@given(st.dictionaries(st.text(TEXT, max_size=20), st.integers(0, 2**63 - 1), max_size=4))
def test_positions_come_back_and_cover_what_was_read(offsets: dict[str, int]) -> None:
    position = msgspec.json.decode(msgspec.json.encode(Position(offsets)), type=Position)
    assert position == Position(offsets)
    for stream, offset in offsets.items():
        assert position.covers(stream, offset)
        assert not position.covers(stream, offset + 1)
    assert not position.covers("another stream than any of them", 1)


def test_the_attributes_make_a_valid_cloudevent() -> None:
    event = samples.signed(samples.feedback())
    attributes = {
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "specversion": envelope.SPECVERSION,
        "time": datetime.datetime.fromtimestamp(event.time_s, datetime.UTC),
        "datacontenttype": envelope.CONTENT_TYPE,
        "dataschema": event.dataschema,
        "partitionkey": event.key,
        "fedlooptopic": event.topic,
        "dssematerial": base64.b64encode(event.signature.encode()).decode(),
    }
    written = JSONFormat().write(CloudEvent(attributes, json.loads(event.data)))
    read = json.loads(written)
    assert read["id"] == event.id
    assert read["partitionkey"] == "device-1"
    assert msgspec.json.encode(read["data"]) == event.data


# --- schemas ---------------------------------------------------------------------------------------------------------


def test_the_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert schemas.main(["--check"]) == 0, "run: python -m fedloop_events.schemas --write"


def test_stale_files_are_named(tmp_path: Path) -> None:
    schemas.write(tmp_path)
    assert schemas.stale(tmp_path) == []
    (tmp_path / "schemas" / "left.over.json").write_text("{}")
    (tmp_path / "asyncapi.yaml").write_text("old")
    (tmp_path / "schemas" / "io.fedloop.client.seen.v1.json").unlink()
    assert [path.name for path in schemas.stale(tmp_path)] == [
        "asyncapi.yaml",
        "io.fedloop.client.seen.v1.json",
        "left.over.json",
    ]
    schemas.write(tmp_path)
    assert schemas.stale(tmp_path) == []


def test_the_check_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(schemas, "stale", lambda: [Path("asyncapi.yaml")])
    assert schemas.main(["--check"]) == 1
    assert "asyncapi.yaml" in (said := capsys.readouterr().err)
    assert "--write" in said
    assert schemas.main([]) == 2


def test_the_schemas_are_schemas_and_refuse_what_the_decoder_refuses() -> None:
    schema = schemas.json_schema(types.FeedbackRecorded, types.FeedbackRecorded.type_name)
    jsonschema.Draft202012Validator.check_schema(schema)
    for wrong in (changed(more=1), changed(seq=-1), changed(client_id="a/b"), changed(text="raw")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(wrong), schema)


def test_the_asyncapi_document_is_yaml_and_its_references_lead_somewhere() -> None:
    document = yaml.safe_load((schemas.FOLDER / "asyncapi.yaml").read_text("utf-8"))
    assert document == schemas.asyncapi()
    assert list(document["channels"]) == list(topics.ALL)
    for channel in document["channels"].values():
        for message in channel["messages"].values():
            name = message["$ref"].removeprefix("#/components/messages/")
            assert (schemas.FOLDER / document["components"]["messages"][name]["payload"]["$ref"]).is_file()

"""The register of event types: each states once what everything else reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import samples
from fedloop_events import envelope, schemas, topics, types
from fedloop_events.types import Audience, Line
from fedloop_server.gateway.visibility import EVERYONE, NOBODY, Visibility


@pytest.fixture
def registered() -> Iterator[None]:
    """Types that a test defines are forgotten after it."""
    current, older = dict(types.CURRENT), dict(types.OLDER)
    yield
    for register, before in ((types.CURRENT, current), (types.OLDER, older)):
        for name in register.keys() - before.keys():
            del register[name]


@pytest.mark.usefixtures("registered")
def test_a_type_that_is_defined_is_decoded_upcast_described_and_shown_to_its_audience_without_another_line() -> None:
    class FieldNoted(types.ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
        """A device has noted something."""

        topic = topics.AUDIT
        type_name = "io.fedloop.field.noted.v2"
        audience = Audience.SUBJECT

        note: Line

    class FieldNotedV1(types.Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
        """Before 2: a number in place of the note."""

        type_name = "io.fedloop.field.noted.v1"
        becomes = FieldNoted

        origin: str
        client_id: str
        seq: int
        number: int

        def upcast(self) -> FieldNoted:
            return FieldNoted(self.origin, self.client_id, self.seq, str(self.number))

    noted = FieldNoted(samples.ORIGIN, "device-1", 3, "7")
    event = samples.event(noted, 1)
    old = envelope.Event(
        event.topic, event.key, event.id, event.source, "io.fedloop.field.noted.v1", 1,
        b'{"origin":"demo","client_id":"device-1","seq":3,"number":7}',
    )  # fmt: skip
    assert envelope.decode(event) == envelope.decode(old) == noted
    for each in (event, old):
        assert Visibility().audience(each) == {"device-1"}
    files = {path.stem for path in schemas.files()}
    assert {"io.fedloop.field.noted.v1", "io.fedloop.field.noted.v2"} <= files
    assert "FieldNoted" in schemas.asyncapi()["channels"]["audit"]["messages"]


@pytest.mark.parametrize("forgotten", ["audience", "topic"])
@pytest.mark.usefixtures("registered")
def test_a_type_that_forgets_its_audience_or_its_topic_is_an_error_when_it_is_imported(forgotten: str) -> None:
    stated = {
        "topic": topics.AUDIT,
        "audience": Audience.NOBODY,
        "type_name": "io.fedloop.field.noted.v1",
        "__module__": __name__,
    }
    del stated[forgotten]
    with pytest.raises(TypeError, match=f"FieldNoted does not state its {forgotten}"):
        type("FieldNoted", (types.Payload,), stated)


@pytest.mark.usefixtures("registered")
def test_two_types_cannot_have_one_name() -> None:
    taken = {"topic": topics.AUDIT, "audience": Audience.NOBODY, "type_name": types.TextMasked.type_name, "__module__": __name__}
    with pytest.raises(TypeError, match=r"text\.masked\.v1, which another one has"):
        type("Again", (types.Payload,), taken)


def test_what_only_a_newer_program_knows_is_its_own_clients_and_nobody_elses() -> None:
    newer = {
        topic: envelope.Event(topic, "device-1", "0" * 32, "/", "io.fedloop.from.tomorrow.v9", 1, b"{}") for topic in topics.ALL
    }
    seen = {topic: Visibility().audience(event) for topic, event in newer.items()}
    own = frozenset({"device-1"})
    assert seen == {
        "clients": own, "feedback": own, "updates": own, "audit": own, "rounds": NOBODY, "releases": NOBODY, "quarantine": NOBODY,
        "scored": NOBODY, "metrics": NOBODY, "training": NOBODY,
    }  # fmt: skip


def test_an_event_under_another_topic_than_its_types_is_shown_to_nobody() -> None:
    event = samples.event(samples.created(), 1)
    assert Visibility().audience(event) is EVERYONE
    moved = envelope.Event("releases", event.key, event.id, event.source, event.type, event.time_s, event.data)
    assert Visibility().audience(moved) is NOBODY

"""Who may speak, where in the log, and for whom: the fold over `clients` against everybody else's claims."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import samples
from fedloop_events import envelope, types
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError, SignatureError
from fedloop_events.folds.identities import Identities
from fedloop_events.types import Payload


def fold(*events: Event) -> Identities:
    identities = Identities()
    for offset, event in enumerate(events, 1):
        apply(identities, event, offset)
    return identities


def apply(identities: Identities, event: Event, offset: int) -> None:
    payload = envelope.decode(event)
    assert payload is not None
    identities.apply(samples.record(event, offset), payload)


CREATED, ENROLLED = samples.signed(samples.created()), samples.signed(samples.enrolled())


def test_the_first_deployment_and_the_first_enrolment_hold() -> None:
    identities = fold(CREATED, ENROLLED)
    assert identities.origin == samples.ORIGIN
    assert identities.server_key == samples.key("server").public_key
    client = identities.clients["device-1"]
    assert (client.node_id, client.epsilon, client.delta, client.revoked) == (11, 8.0, 1e-5, False)


@pytest.mark.parametrize(
    "event",
    [
        samples.signed(samples.created(server="other"), by="other"),
        samples.signed(samples.enrolled(by="other"), by="other"),
        samples.signed(samples.enrolled("device-2", "11")),
        samples.signed(samples.enrolled("device-2", "12", by="device-1"), by="device-1"),
        samples.signed(samples.enrolled("device-2", "12", by="device-2"), by="device-1"),
        samples.signed(samples.enrolled("device-2", "12", by="server"), by="server"),
        samples.signed(samples.enrolled("server", "12", by="device-2"), by="device-2"),
        samples.signed(samples.enrolled("device-2", "012")),
        samples.signed(samples.enrolled("device-2", "0")),
        samples.signed(samples.enrolled("device-2", str(1 << 64))),
        samples.event(samples.enrolled("device-2", "12")),
        samples.signed(msgspec.structs.replace(samples.enrolled("device-2", "12"), origin="elsewhere")),
        samples.signed(msgspec.structs.replace(samples.enrolled("device-2", "12"), public_key="A" * 43 + "="), by="device-2"),
        samples.signed(samples.revoked(), by="device-1"),
        samples.signed(samples.seen(), by="device-2"),
        samples.signed(samples.seen("device-2")),
        samples.event(samples.seen()),
    ],
    ids=range(17),
)
def test_a_false_claim_is_refused_and_changes_nothing(event: Event) -> None:
    identities = fold(CREATED, ENROLLED)
    before = identities.to_state().replace(b'"log":2', b'"log":3')
    with pytest.raises(InvalidEventError):
        apply(identities, event, 3)
    assert identities.to_state() == before


def test_nothing_is_believed_before_the_deployment_exists() -> None:
    identities = Identities()
    with pytest.raises(InvalidEventError):
        apply(identities, ENROLLED, 1)
    assert not identities.clients


def test_seen_keeps_what_the_device_last_said() -> None:
    identities = fold(CREATED, ENROLLED)
    apply(identities, samples.signed(samples.seen()), 3)
    assert identities.clients["device-1"].examples_at_least == 64
    assert identities.clients["device-1"].seen_ms == 3


def said(payload: Payload, by: str | None = None) -> tuple[Event, Payload]:
    return samples.signed(payload, by), payload


@pytest.mark.parametrize("make", [samples.feedback, samples.seen, samples.epoch, samples.created, samples.enrolled])
def test_what_its_author_said_is_authentic(make: Callable[[], Payload]) -> None:
    fold(CREATED, ENROLLED).authenticate(*said(make()))


def test_the_key_of_another_signs_for_nobody() -> None:
    identities = fold(CREATED, ENROLLED, samples.signed(samples.enrolled("device-2", "12")))
    for payload, by in ((samples.feedback(), "device-2"), (samples.epoch(), "device-1"), (samples.feedback(), "server")):
        with pytest.raises(SignatureError):
            identities.authenticate(*said(payload, by))


@pytest.mark.parametrize(
    "change", [{"topic": "updates"}, {"key": "device-2"}, {"source": "/demo/server"}, {"source": "/demo/clients/device-2"}]
)
def test_an_envelope_that_says_other_than_its_data_is_refused_even_if_signed(change: dict[str, str]) -> None:
    from fedloop_events import signatures

    event = msgspec.structs.replace(samples.event(samples.feedback()), **change)
    with pytest.raises(InvalidEventError, match="another topic, key or source"):
        fold(CREATED, ENROLLED).authenticate(signatures.sign(event, samples.key("device-1")), samples.feedback())


def test_another_deployments_event_is_refused() -> None:
    payload = msgspec.structs.replace(samples.feedback(), origin="elsewhere")
    with pytest.raises(InvalidEventError, match="another deployment"):
        fold(CREATED, ENROLLED).authenticate(*said(payload))


def test_a_client_is_heard_from_its_enrolment_to_its_revocation() -> None:
    """Whenever the reader asks: later knowledge does not change what stood where."""
    identities = fold(CREATED, ENROLLED)
    apply(identities, samples.signed(samples.revoked()), 10)
    event, payload = said(samples.feedback())
    for offset, heard in ((1, False), (3, True), (9, True), (11, False)):
        if heard:
            identities.authenticate(samples.record(event, offset), payload)
        else:
            with pytest.raises(InvalidEventError):
                identities.authenticate(samples.record(event, offset), payload)
    with pytest.raises(InvalidEventError, match="revoked"):
        identities.authenticate(event, payload)


def test_across_streams_the_logs_clock_decides() -> None:
    identities = fold(CREATED, ENROLLED)
    apply(identities, samples.signed(samples.revoked()), 10)
    event, payload = said(samples.feedback())
    identities.authenticate(samples.record(event, 500, stream="feedback-0", appended_ms=9), payload)
    with pytest.raises(InvalidEventError):
        identities.authenticate(samples.record(event, 1, stream="feedback-0", appended_ms=11), payload)


def test_a_revoked_client_does_not_come_back() -> None:
    identities = fold(CREATED, ENROLLED, samples.signed(samples.revoked()))
    claims = (ENROLLED, samples.signed(samples.enrolled(by="other"), by="other"), samples.signed(samples.seen()))
    for offset, event in enumerate(claims, 4):
        with pytest.raises(InvalidEventError):
            apply(identities, event, offset)
    assert identities.clients["device-1"].revoked


def test_applying_twice_changes_nothing() -> None:
    identities = fold(CREATED, ENROLLED)
    apply(identities, ENROLLED, 2)
    assert len(identities.clients) == 1


def test_a_state_comes_back_whole() -> None:
    identities = fold(CREATED, ENROLLED, samples.signed(samples.seen()), samples.signed(samples.revoked()))
    restored = Identities.from_state(identities.to_state())
    assert restored.to_state() == identities.to_state()
    with pytest.raises(InvalidEventError, match="node id"):
        apply(restored, samples.signed(samples.enrolled("device-2", "11")), 9)


def test_what_is_handed_out_is_read_only() -> None:
    clients = fold(CREATED, ENROLLED).clients
    with pytest.raises(TypeError):
        clients["x"] = clients["device-1"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        clients["device-1"].delta = 0.5  # type: ignore[misc]
    assert isinstance(samples.created(), types.DeploymentCreated)

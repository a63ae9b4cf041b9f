"""Every route by every role, every event and every blob by its owner. What is not granted is denied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import samples
from fedloop_clients.device_view import DeviceView
from fedloop_events import envelope, parts, topics, types
from fedloop_events.envelope import Record
from fedloop_events.errors import BlobError, LogChangedError, NotAllowedError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.http import cloudevents
from fedloop_events.logs.port import START, read_all
from fedloop_events.parts import split
from fedloop_events.types import BlobRef
from fedloop_events.verify.log import verify
from fedloop_server.gateway import describing
from fedloop_server.gateway.limits import Limits
from gateway import rounds
from gateway.harness import Served, code, serving

ROLES = ("nobody", "stranger", "device-1", "revoked", "server")
BLOB = b"a new blob"
NAME = hashlib.sha256(BLOB).hexdigest()
OWN = cloudevents.encode_batch([samples.signed(samples.seen("device-1", 6))])

Statuses = tuple[int, int, int, int, int]
TABLE: dict[tuple[str, str], tuple[bytes, Statuses]] = {
    ("POST", "/v1/events"): (OWN, (401, 401, 204, 403, 204)),
    ("GET", "/v1/events"): (b"", (401, 401, 200, 403, 200)),
    ("GET", "/v1/end"): (b"", (401, 401, 200, 403, 200)),
    ("PUT", "/v1/blobs/{sha256}"): (BLOB, (401, 401, 204, 403, 204)),
    ("GET", "/v1/blobs/{sha256}"): (b"", (401, 401, 404, 403, 404)),
    ("HEAD", "/v1/blobs/{sha256}"): (b"", (401, 401, 404, 403, 404)),
    ("GET", "/v1/deployment"): (b"", (200, 200, 200, 200, 200)),
    ("GET", "/healthz"): (b"", (200, 200, 200, 200, 200)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, BlobRef]]]:
    names = ("device-1", "device-2", "device-3", "device-4", "revoked")
    with serving(tmp_path_factory.mktemp("world"), *names) as served:
        refs = rounds.everything(served.log, served.blobs)
        served.log.append([samples.signed(samples.revoked("revoked"))])
        yield served, refs


def test_the_table_below_names_every_route_and_so_does_the_document() -> None:
    described = {
        (method.upper(), path)
        for path, item in describing.document(Limits())["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert set(TABLE) == described


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path"), list(TABLE))
def test_every_route_by_every_role(
    tmp_path: Path, world: tuple[Served, dict[str, BlobRef]], method: str, path: str, role: str
) -> None:
    served = world[0]
    body, statuses = TABLE[method, path]
    target = path.replace("{sha256}", NAME if body else hashlib.sha256(role.encode()).hexdigest())
    answer = served.raw(method, target, None if role == "nobody" else role, body)
    assert answer.status_code == statuses[ROLES.index(role)], answer.text
    if answer.status_code >= 400 and method != "HEAD":
        expected = {401: {"nobody": "unsigned", "stranger": "unknown-client"}.get(role), 403: "revoked", 404: "not-found"}
        assert code(answer) == expected[answer.status_code]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "GET", "HEAD"])
@pytest.mark.parametrize(
    "path", sorted({path for _, path in TABLE} | {"/", "/docs", "/v1", "/v1/events/", "/metrics", "//healthz"})
)
def test_what_is_no_route_is_refused(world: tuple[Served, dict[str, BlobRef]], method: str, path: str) -> None:
    if (method, path) in TABLE:
        return
    answer = world[0].raw(method, path.replace("{sha256}", NAME), "server")
    assert answer.status_code in {404, 405}
    if method != "HEAD":
        assert code(answer) in {"not-found", "method"}


# --- events ---


def kinds(served: Served, name: str) -> list[tuple[str, str]]:
    """Type and key of all that this client can read."""
    return [(record.type.split(".", 2)[2].rsplit(".", 1)[0], record.key) for record in read_all(served.as_client(name))]


def test_a_device_sees_what_concerns_it_and_nothing_else(world: tuple[Served, dict[str, BlobRef]]) -> None:
    assert kinds(world[0], "device-2") == [
        ("deployment.created", "demo"),
        ("client.enrolled", "device-2"),
        ("epoch.started", "main"),
        ("round.requested", "main"),
        ("release.proposed", "default"),
        ("release.published", "default"),
        ("release.evaluated", "default"),
        ("round.opened", "main"),
        ("instruction.sent", "main"),
        ("update.submitted", "device-2"),
        ("round.closed", "main"),
        ("feedback.recorded", "device-2"),
        ("text.masked", "device-2"),
        ("client.seen", "device-2"),
    ]


def test_its_instruction_is_its_own(world: tuple[Served, dict[str, BlobRef]]) -> None:
    for name in ("device-1", "device-2"):
        sent = [envelope.decode(record) for record in read_all(world[0].as_client(name), (topics.ROUNDS,))]
        assert [each.client_id for each in sent if isinstance(each, types.InstructionSent)] == [name]


def test_a_device_that_was_not_chosen_sees_no_more_than_that_there_are_rounds(world: tuple[Served, dict[str, BlobRef]]) -> None:
    seen = [kind for kind, key in kinds(world[0], "device-3") if key == "main"]
    assert seen == ["epoch.started", "round.requested", "round.opened", "round.aborted"]


def test_a_device_sees_its_part_of_a_large_round_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    names = ("device-1", "device-2", "device-3")
    with serving(tmp_path, *names) as served:
        out = [types.Exclusion("device-3", "not-drawn")]
        opened = msgspec.structs.replace(rounds.opened("device-1", "device-2"), excluded=out)
        said = [samples.epoch(), *split(opened), *split(rounds.closed("device-1", excluded=("device-2",)))]
        served.log.append([samples.signed(payload) for payload in said])
        for name in names[:2]:
            seen = [envelope.decode(record) for record in read_all(served.as_client(name), (topics.ROUNDS,))]
            listed = [each for each in seen if isinstance(each, types.CohortListed)]
            assert [(each.cohort, each.excluded) for each in listed] == [([name], [])]
            assert [list(each.named) for each in seen if isinstance(each, types.RepliesListed)] == [[name]]
            view = DeviceView(name, samples.key("server").public_key)
            view.catch_up(served.as_client(name))
            assert len([each for each in seen if isinstance(each, types.RoundOpened | types.RoundClosed)]) == 2
            assert view.rounds == {}, "it has seen that the round was closed"
            again = DeviceView(name, samples.key("server").public_key, view.to_state())
            again.catch_up(served.as_client(name))  # knows the log again by its part of it
            assert [mark.lasting for mark in again._state.marks["log"]] == [True, False]
            again._state.marks["log"] = [msgspec.structs.replace(each, sha256=bytes(32)) for each in again._state.marks["log"]]
            with pytest.raises(LogChangedError):
                again.check_end(served.as_client(name))
        assert kinds(served, "device-3")[-1] == ("epoch.started", "main")


def test_the_server_sees_everything_and_the_revoked_nothing(world: tuple[Served, dict[str, BlobRef]]) -> None:
    served = world[0]
    own = [(record.id, record.offset) for record in read_all(served.log)]
    assert [(record.id, record.offset) for record in read_all(served.as_client("server"))][: len(own)] == own
    with pytest.raises(NotAllowedError, match="may not read"):
        served.as_client("revoked").read()


def test_whoever_comes_from_far_back_or_in_small_steps_sees_the_same(tmp_path: Path) -> None:
    """The ring holds five events, so nearly everything is read from the log."""
    limits = Limits(ring_events=5, scan_events=7, page_events=3)
    with serving(tmp_path, "device-1", "device-2", "device-3", "device-4", limits=limits) as served:
        rounds.everything(served.log, served.blobs)
        first = kinds(served, "device-2")
        assert len(first) == 14
        after, small = START, list[Record]()
        log = served.as_client("device-2")
        while (batch := log.read(after=after, limit=2)).records:
            small += batch.records
            after = batch.position
        assert [(each.type, each.key) for each in small] == [(each.type, each.key) for each in read_all(log)]
        assert served.log.end().offsets == batch.position.offsets


# --- blobs ---


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("device-1", {"release", "instruction-1"}),
        ("device-2", {"release", "instruction-2"}),
        ("device-3", {"release"}),
        ("server", {"release", "instruction-1", "instruction-2", "update-1", "update-2", "secret", "scores"}),
    ],
)
def test_a_device_reads_the_blobs_that_it_is_told_to(
    world: tuple[Served, dict[str, BlobRef]], name: str, readable: set[str]
) -> None:
    served, refs = world
    blobs = served.blobs_of(name)
    assert {each for each, ref in refs.items() if blobs.exists(ref)} == readable
    for each, ref in refs.items():
        if each in readable:
            assert blobs.get(ref) == each.encode() * 10
        else:
            with pytest.raises(BlobError):
                blobs.get(ref)


def test_what_an_evaluation_is_made_of_is_the_servers_alone(served: Served) -> None:
    """Which held-out examples a release gets right: everyone sees the name of the file, nobody but the server the file."""
    scores, release = served.blobs.put([b"scores"]), served.blobs.put([b"release"])
    said = [samples.epoch(), *rounds.published(release), rounds.evaluated(scores)]
    served.log.append([samples.signed(payload) for payload in said])
    seen = [envelope.decode(record) for record in read_all(served.as_client("device-1"), (topics.RELEASES,))]
    assert [each.scores for each in seen if isinstance(each, types.ReleaseEvaluated)] == [scores]
    device = served.blobs_of("device-1")
    assert device.exists(release)
    assert not device.exists(scores)
    for method in ("GET", "HEAD"):
        assert served.raw(method, f"/v1/blobs/{scores.sha256}", "device-1").status_code == 404
    assert served.blobs_of("server").get(scores) == b"scores"
    # A device that checks the log through a gateway does not miss what it may not read.
    place = DeploymentLocation(served.address, served.address)
    report = verify(place, lambda: served.as_client("device-1"), lambda: device)
    assert (report.wrong, report.blobs) == (0, 1), report.findings


def test_naming_a_blob_gives_no_right_to_it_and_sending_it_does(served: Served) -> None:
    instruct(served, "device-1")
    secret = served.blobs_of("device-1").put([b"device-1's update"])
    served.log.append([samples.signed(rounds.submitted("device-1", secret))])
    other = served.blobs_of("device-2")
    sent = instruct(served, "device-2")
    served.as_client("device-2").append([samples.signed(answer("device-2", sent, blob=secret))])
    assert not other.exists(secret)
    instruct(served, "device-2")
    assert other.put([b"device-1's update"]) == secret
    assert other.get(secret) == b"device-1's update"


def test_a_forged_instruction_gives_no_right_to_a_blob(served: Served) -> None:
    """Somebody who can write to the log itself, but has not the server's key."""
    secret = served.blobs.put([b"secret"])
    forged = samples.signed(rounds.instruction("device-2", secret), by="device-2")
    served.log.append([forged])
    assert not served.blobs_of("device-2").exists(secret)


def test_a_large_blob_comes_and_goes_whole(served: Served) -> None:
    content = bytes(range(256)) * 40_000
    rounds.ask(served.log, "device-1")
    ref = served.blobs_of("device-1").put([content[:7], content[7:]])
    assert served.blobs_of("device-1").get(ref) == content
    assert b"".join(bytes(block) for block in served.blobs_of("server").blocks(ref)) == content


def test_the_range_header_changes_nothing(served: Served) -> None:
    instruct(served, "device-1")
    ref = served.blobs_of("device-1").put([b"0123456789" * 100])
    many = ",".join(f"{number}-" for number in range(500))
    answer = served.raw("GET", f"/v1/blobs/{ref.sha256}", "device-1", headers={"range": f"bytes={many}"})
    assert (answer.status_code, len(answer.content)) == (200, 1000)


# --- appends ---


def instruct(served: Served, client_id: str) -> str:
    """The id of an instruction to the client."""
    return rounds.ask(served.log, client_id, "r0001")


def answer(client_id: str, instruction_id: str, seq: int = 1, blob: BlobRef | None = None) -> types.UpdateSubmitted:
    arrays = {} if blob is None else {"arrays": blob}
    return types.UpdateSubmitted(
        origin=samples.ORIGIN,
        client_id=client_id,
        seq=seq,
        run_id="main",
        instruction_id=instruction_id,
        content=types.Content(arrays=arrays),
    )


def spend(seq: int, spend_seq: int, previous: str, instruction_id: str) -> types.BudgetSpent:
    return types.BudgetSpent(
        origin=samples.ORIGIN,
        client_id="device-1",
        seq=seq,
        spend_seq=spend_seq,
        previous=previous,
        run_id="main",
        instruction_id=instruction_id,
        mechanism=types.Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, steps=1, divisor=1.0),
    )


def refusal(served: Served, *payloads: types.ClientEvent, by: str = "device-1") -> str:
    return code(served.raw.append(by, *(samples.signed(payload, by) for payload in payloads)))


def test_a_device_continues_its_own_numbers_and_may_send_again(served: Served) -> None:
    first, second = samples.signed(samples.seen(seq=1)), samples.signed(samples.feedback(2))
    before = served.log.end()
    assert refusal(served, samples.seen(seq=10**9)) == "sequence"
    assert refusal(served, samples.seen(seq=0)) == "sequence"
    assert refusal(served, samples.seen(seq=1), samples.seen(seq=1)) == "sequence"
    assert served.log.end() == before
    assert served.raw.append("device-1", first).status_code == 204
    assert refusal(served, samples.seen(seq=1)) == "sequence"
    assert served.raw.append("device-1", first, second).status_code == 204
    assert len(list(read_all(served.log))) == 5


def test_a_gateway_that_starts_or_stands_beside_another_knows_the_numbers(served: Served, tmp_path: Path) -> None:
    served.as_client("device-1").append([samples.signed(samples.seen(seq=1)), samples.signed(samples.feedback(2))])
    other = Served(served.log, served.blobs, tmp_path / "other")
    other.start()
    try:
        assert refusal(other, samples.seen(seq=2)) == "sequence"
        assert other.raw.append("device-1", samples.signed(samples.seen(seq=3))).status_code == 204
        assert served.raw.append("device-1", samples.signed(samples.seen(seq=4))).status_code == 204
    finally:
        other.stop()


def test_numbers_of_a_forged_event_in_the_log_are_not_the_clients(served: Served) -> None:
    served.log.append([samples.signed(samples.seen(seq=7), by="device-2")])
    served.as_client("device-2").read()
    assert served.raw.append("device-1", samples.signed(samples.seen(seq=1))).status_code == 204


def test_who_is_enrolled_cannot_enrol_its_name_under_another_key(served: Served) -> None:
    again = samples.enrolled("device-1", "77", by="second")
    assert refusal(served, again) == "name-taken"
    assert code(served.raw.append("server", samples.signed(again, by="second"))) == "name-taken"
    assert code(served.raw.append("new", samples.signed(samples.enrolled("new", "11")))) == "name-taken"


def test_an_answer_belongs_to_an_instruction_to_this_client(served: Served) -> None:
    mine, others = instruct(served, "device-1"), instruct(served, "device-2")
    assert refusal(served, answer("device-1", "0" * 32)) == "instruction"
    assert refusal(served, answer("device-1", others)) == "instruction"
    assert refusal(served, spend(1, 0, "", others)) == "instruction"
    assert served.raw.append("device-1", samples.signed(answer("device-1", mine))).status_code == 204


def test_an_update_that_names_a_blob_is_taken_when_the_blob_is_there(served: Served) -> None:
    mine, content = instruct(served, "device-1"), b"an update"
    ref = BlobRef(hashlib.sha256(content).hexdigest(), len(content))
    event = samples.signed(answer("device-1", mine, blob=ref))
    assert code(served.raw.append("device-1", event)) == "blob-absent"
    served.blobs_of("device-1").put([content])
    assert refusal(served, answer("device-1", mine, blob=BlobRef(ref.sha256, 10**6))) == "blob-absent"
    assert served.raw.append("device-1", event).status_code == 204


def test_a_spend_continues_its_chain(served: Served) -> None:
    mine = instruct(served, "device-1")
    first = spend(1, 0, "", mine)
    head = hashlib.sha256(samples.event(first).data).hexdigest()
    assert refusal(served, spend(1, 1, "", mine)) == "sequence"
    assert refusal(served, spend(1, 0, head, mine)) == "sequence"
    assert served.raw.append("device-1", samples.signed(first)).status_code == 204
    assert refusal(served, spend(2, 0, "", mine)) == "sequence"
    assert refusal(served, spend(2, 1, "", mine)) == "sequence"
    assert served.raw.append("device-1", samples.signed(spend(2, 1, head, mine))).status_code == 204


def test_a_device_says_nothing_in_another_name(served: Served) -> None:
    before = served.log.end()
    own = samples.signed(samples.feedback(1, "device-1"))
    others = (
        samples.feedback(1, "device-2"),
        samples.epoch(),
        samples.revoked("device-2"),
        samples.created(),
        samples.enrolled("x"),
    )
    for payload in others:
        for event in (samples.signed(payload), samples.signed(payload, by="device-1")):
            assert code(served.raw.append("device-1", own, event)) == "forbidden"
    assert served.log.end() == before


def test_a_forged_or_unsigned_or_changed_event_is_refused(served: Served) -> None:
    import msgspec

    before = served.log.end()
    good = samples.signed(samples.feedback(1, "device-1"))
    bad = [
        samples.signed(samples.feedback(1, "device-1"), by="device-2"),
        samples.event(samples.feedback(1, "device-1")),
        msgspec.structs.replace(good, id="0" * 32),
        msgspec.structs.replace(good, data=good.data.replace(b"lost", b"last")),
        msgspec.structs.replace(good, time_s=5),
        msgspec.structs.replace(good, topic=topics.AUDIT),
        msgspec.structs.replace(good, key="device-2"),
        msgspec.structs.replace(good, source="/demo/clients/device-2"),
    ]
    for event in bad:
        for by in ("device-1", "server"):
            assert code(served.raw.append(by, event)) == "event"
    assert served.log.end() == before


def test_the_server_appends_what_its_author_has_signed(served: Served) -> None:
    events = [
        samples.signed(samples.feedback(1, "device-2")),
        samples.signed(samples.epoch()),
        samples.signed(samples.enrolled("new", "77")),
    ]
    assert served.raw.append("server", *events).status_code == 204
    assert len([record for record in read_all(served.log) if record.id in {event.id for event in events}]) == 3


# --- enrolment ---


def test_who_is_new_appends_its_own_enrolment_and_nothing_else(served: Served) -> None:
    enrolment = samples.signed(samples.enrolled("new", "77"))
    refused = [
        ("new", [samples.signed(samples.seen("new", 0))], None),
        ("new", [enrolment, samples.signed(samples.seen("new", 1))], None),
        ("new", [samples.signed(samples.enrolled("other", "78"))], None),
        ("new", [enrolment], "other"),
        ("new", [samples.signed(samples.enrolled("new", "77"), by="other")], None),
        ("new", [samples.signed(samples.enrolled("new", "11"))], None),
        ("new", [samples.signed(samples.enrolled("new", "077"))], None),
        ("new", [samples.signed(samples.enrolled("new", "77", by="device-1"), by="device-1")], "device-1"),
        ("new", [samples.signed(samples.enrolled("new", "77", by="server"), by="server")], "server"),
        ("device-1", [samples.signed(samples.enrolled("device-1", "79", by="thief"), by="thief")], "thief"),
    ]
    before = served.log.end()
    codes = [code(served.raw.append(by, *events, key=key)) for by, events, key in refused]
    assert codes == [
        *("unknown-client", "unknown-client", "unknown-client", "signature", "event"),
        *("name-taken", "event", "name-taken", "name-taken", "signature"),
    ]
    assert served.log.end() == before
    assert served.raw.append("new", enrolment).status_code == 204
    assert kinds(served, "new") == [("deployment.created", "demo"), ("client.enrolled", "new")]


def test_who_is_revoked_is_heard_no_more_at_once(served: Served) -> None:
    assert served.raw("GET", "/v1/end", "device-1").status_code == 200
    served.raw.append("server", samples.signed(samples.revoked("device-1")))
    served.as_client("device-2").read()
    assert code(served.raw("GET", "/v1/end", "device-1")) == "revoked"
    assert code(served.raw.append("device-1", samples.signed(samples.seen("device-1", 9)))) == "revoked"

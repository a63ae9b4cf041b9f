"""What the Kafka log promises beyond the contract of every log (test_log_contract.py)."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import brokers
import msgspec
import pytest
import samples
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from fedloop_events import envelope, topics
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError, LogChangedError, LogError, UnreachableError, UsageError
from fedloop_events.folds.admit import Admit, Standing
from fedloop_events.folds.marks import Marks, check, remember
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.kafka import KafkaLog, codec, fetching
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_events.logs.kafka.sharing import SharedReader
from fedloop_events.logs.port import START, Batch, Position, read_all
from hypothesis import given
from hypothesis import strategies as st
from kafka_partitions import written


@pytest.fixture
def log(kafka_url: str) -> Iterator[KafkaLog]:
    log = KafkaLog(kafka_url, create=True)
    yield log
    log.close()


def ids_of(log: KafkaLog, wanted: tuple[str, ...] = topics.ALL) -> list[str]:
    return [record.id for record in read_all(log, wanted)]


# --- where it is -----------------------------------------------------------------------------------------------------


def test_a_location_is_brokers_prefix_and_a_file_of_properties(tmp_path: Path) -> None:
    file = tmp_path / "client.properties"
    file.write_text(
        "# the agent's\nsecurity.protocol=SASL_SSL\nsasl.mechanism = SCRAM-SHA-512\nsasl.username=a\nsasl.password=b=c\n\n"
    )
    settings = KafkaSettings.parse(f"kafka://one.example:9092,two.example:9093/bank?config={file}")
    assert (settings.bootstrap, settings.topic("rounds")) == ("one.example:9092,two.example:9093", "bank.rounds")
    assert settings.client()["sasl.password"] == "b=c"
    assert KafkaSettings.parse("kafka://127.0.0.1:9092").prefix == "fedloop"
    assert KafkaSettings.parse("kafka://[::1]:9092").bootstrap == "[::1]:9092"


@pytest.mark.parametrize(
    "url",
    [
        "kafka://127.0.0.1",
        "kafka://127.0.0.1:0",
        "kafka://127.0.0.1:70000",
        "kafka://user:secret@127.0.0.1:9092",
        "kafka://127.0.0.1:9092,",
        "kafka://127.0.0.1:9092/a/b",
        "kafka://127.0.0.1:9092/a.b",
        "kafka://127.0.0.1:9092/p?config=/nowhere",
        "kafka://127.0.0.1:9092/p?user=x",
        "kafka://127.0.0.1:9092/p#f",
        "kafka://broker.example:9092",
        "kafka://127.0.0.1:9092,10.0.0.7:9092",
        "http://127.0.0.1:9092",
    ],
)
def test_a_location_that_is_malformed_or_unsafe_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        KafkaSettings.parse(url)
    assert "secret" not in f"{caught.value.message}{caught.value.cause}{caught.value.hint}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("security.protocol=SASL_PLAINTEXT\nsasl.mechanism=SCRAM-SHA-512\nsasl.password=hunter2", "SASL_PLAINTEXT"),
        ("security.protocol=SASL_SSL\nsasl.mechanism=OAUTHBEARER", "OAUTHBEARER"),
        ("security.protocol=SASL_SSL\nsasl.password=hunter2", "mechanism"),
        ("security.protocol=SSL\nsasl.username=x", "SASL_SSL"),
        ("security.protocol=SSL\nssl.endpoint.identification.algorithm=none", "certificate"),
        ("enable.ssl.certificate.verification=false", "enable.ssl.certificate.verification"),
        ("sasl.oauthbearer.token.endpoint.url=http://169.254.169.254/", "sasl.oauthbearer"),
        ("sasl.password=hunter2\nsasl.password=hunter3", "line 2"),
        ("hunter2", "line 1"),
    ],
)
def test_properties_that_would_weaken_the_connection_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        KafkaSettings.parse(f"kafka://127.0.0.1:9092/p?config={tmp_path / 'p'}")
    assert "hunter" not in f"{caught.value.message}{caught.value.cause}{caught.value.hint}"


def test_brokers_that_are_away_are_waited_for_and_no_longer() -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="brokers"):
        KafkaLog("kafka://127.0.0.1:1/away", timeout_s=1.5)
    assert time.monotonic() - began < 6


def refusal(url: str) -> str:
    """Why the log is not opened, as soon as the broker shows what was changed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            KafkaLog(url).close()
        except LogError as error:
            return error.message
    raise AssertionError("the log is opened")


# --- topics ----------------------------------------------------------------------------------------------------------


def test_a_log_that_was_not_made_is_no_log(kafka_url: str) -> None:
    with pytest.raises(UsageError, match="there is no log"):
        KafkaLog(kafka_url)


@pytest.mark.parametrize(
    ("topic", "key", "value"),
    [
        (topics.AUDIT, "cleanup.policy", "compact"),
        (topics.ROUNDS, "retention.ms", "60000"),
        (topics.UPDATES, "retention.bytes", "1000000"),
        (topics.FEEDBACK, "message.timestamp.type", "CreateTime"),
    ],
)
def test_a_topic_whose_settings_would_break_a_promise_is_refused(
    kafka: str, kafka_url: str, log: KafkaLog, topic: str, key: str, value: str
) -> None:
    resource = ConfigResource(
        ResourceType.TOPIC,
        log.settings.topic(topic),
        incremental_configs=[ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)],
    )
    admin = AdminClient({"bootstrap.servers": kafka})
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()
    assert f"{topic} has {key}={value}" in refusal(kafka_url)


def grow(kafka: str, log: KafkaLog, **partitions: int) -> None:
    wanted = [NewPartitions(log.settings.topic(name), count) for name, count in partitions.items()]
    admin = AdminClient({"bootstrap.servers": kafka})
    for future in admin.create_partitions(wanted).values():
        future.result()


def test_a_topic_that_has_got_more_partitions_is_read_and_written_as_before(kafka: str, kafka_url: str, log: KafkaLog) -> None:
    clients = [f"device-{number}" for number in range(40)]
    first = [samples.event(samples.feedback(1, each), number=number) for number, each in enumerate(clients)]
    audit = [samples.event(samples.created(f"o{number}"), number=100 + number) for number in range(3)]
    log.append([*first, *audit])
    grow(kafka, log, clients=3, feedback=9)
    later = [samples.event(samples.feedback(2, each), number=200 + number) for number, each in enumerate(clients)]
    log.append(later)  # whose connections are older than the partitions
    again = KafkaLog(kafka_url)
    last = [samples.event(samples.feedback(3, each), number=300 + number) for number, each in enumerate(clients)]
    more = [samples.event(samples.created(f"p{number}"), number=400 + number) for number in range(20)]
    again.append([*last, *more])
    for reader in (log, again):
        found = list(read_all(reader))
        assert {each.id for each in found} == {each.id for each in [*first, *audit, *later, *last, *more]}
        for events in zip(first, later, last, strict=True):
            records = [each for each in found if each.key == events[0].key]
            assert [each.id for each in records] == [each.id for each in events]
            assert len({each.stream for each in records}) == 1
        order = [each.id for each in found if each.topic == topics.CLIENTS]
        assert order == [each.id for each in [*audit, *more]]
    again.close()


def test_what_stands_in_a_partition_that_no_reader_reads_stops_writers_and_nobody_else(
    kafka: str, kafka_url: str, log: KafkaLog
) -> None:
    log.append([samples.event(samples.created())])
    grow(kafka, log, clients=2)
    written(kafka, log.settings.topic(topics.CLIENTS), 1)
    again = KafkaLog(kafka_url)
    assert len(ids_of(again)) == 1
    with pytest.raises(LogError, match=r"written to .*clients-1") as caught:
        again.append([samples.event(samples.feedback())])
    assert "another prefix" in caught.value.hint
    again.close()


def test_a_key_is_in_the_partition_that_librdkafka_would_choose(kafka: str, log: KafkaLog) -> None:
    places: dict[bytes, int] = {}
    producer = Producer({"bootstrap.servers": kafka})
    topic = log.settings.topic(topics.UPDATES)
    for number in range(50):
        key = f"gerät-{number}".encode()
        producer.produce(topic, b"{}", key, on_delivery=lambda _, sent: places.update({sent.key(): sent.partition()}))
    assert producer.flush(20) == 0
    assert places == {key: codec.partition(topics.UPDATES, key) for key in places}
    assert len(places) == 50


def test_a_topic_with_too_few_partitions_is_refused_with_what_can_be_done(kafka: str, kafka_url: str) -> None:
    settings = KafkaSettings.parse(kafka_url)
    admin = AdminClient({"bootstrap.servers": kafka})
    for future in admin.create_topics([NewTopic(settings.topic(topics.FEEDBACK), 2)]).values():
        future.result()
    with pytest.raises(LogError, match="feedback has 2 partitions, not 6") as caught:
        KafkaLog(kafka_url, create=True)
    assert caught.value.hint.startswith("use another prefix")


# --- on the wire -----------------------------------------------------------------------------------------------------


def events() -> st.SearchStrategy[Event]:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
    return st.builds(
        Event,
        topic=st.sampled_from(topics.ALL),
        key=text,
        id=st.binary(min_size=16, max_size=16).map(bytes.hex),
        source=text,
        type=text,
        time_s=st.integers(0, 253_402_300_799),
        data=st.binary(min_size=1, max_size=200),
        signature=st.text("abcdefgh=", max_size=50),
    )


@given(events())
def test_an_event_survives_the_wire(event: Event) -> None:
    envelope.check(event)
    record = codec.record(event.topic, event.key.encode(), event.data, codec.headers(event), stream="s", offset=1, appended_ms=2)
    assert event == Event(**{name: getattr(record, name) for name in Event.__struct_fields__})


def _without(name: str) -> Callable[[codec.Headers], codec.Headers]:
    return lambda headers: [each for each in headers if each[0] != name]


def _with(name: str, value: bytes) -> Callable[[codec.Headers], codec.Headers]:
    return lambda headers: [(each, value if each == name else old) for each, old in headers]


@pytest.mark.parametrize(
    "change",
    [
        *map(_without, ("ce_id", "ce_type", "ce_source", "ce_time", "ce_specversion", "ce_dataschema", "content-type")),
        _with("ce_id", b"f" * 31),
        _with("ce_id", b"F" * 32),
        _with("ce_id", b"\xff" * 32),
        _with("ce_source", b"\xff"),
        _with("ce_specversion", b"0.3"),
        _with("content-type", b"application/avro"),
        _with("ce_time", b"2026-11-24T00:00:00.5Z"),
        _with("ce_time", b"2026-11-24T00:00:00+00:00"),
        _with("ce_time", b"yesterday"),
        _with("ce_dataschema", b"urn:other"),
        _with("ce_dssematerial", b"x" * 10_000),
        lambda headers: [*headers, ("ce_id", b"0" * 32)],
        lambda headers: [],
    ],
)
def test_a_message_that_is_no_event_is_refused_by_every_reader(change: Callable[[codec.Headers], codec.Headers]) -> None:
    event = samples.signed(samples.feedback())
    record = codec.record(
        event.topic, event.key.encode(), event.data, change(codec.headers(event)), stream="s", offset=1, appended_ms=2
    )
    with pytest.raises(InvalidEventError, match="is no event"):
        envelope.decode(record)


def test_the_cloudevents_package_reads_what_is_on_the_wire(kafka: str, log: KafkaLog) -> None:
    event = samples.signed(samples.epoch())
    log.append([event])
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": "other", "auto.offset.reset": "earliest"})
    consumer.assign([TopicPartition(log.settings.topic(topics.ROUNDS), 0, 0)])
    message = consumer.poll(20)
    consumer.close()
    assert message is not None
    assert message.error() is None
    read = from_binary_event(KafkaMessage(dict(message.headers() or ()), message.key(), message.value()))
    assert (read.get_id(), read.get_source(), read.get_type()) == (event.id, event.source, event.type)
    assert (read.get_specversion(), read.get_datacontenttype(), read.get_dataschema()) == (
        "1.0",
        "application/json",
        f"urn:fedloop:schema:{event.type}",
    )
    at = read.get_time()
    assert at is not None
    assert at.timestamp() == event.time_s
    assert read.get_extension("dssematerial") == event.signature
    assert read.get_data() == msgspec.json.decode(event.data)


def test_another_consumer_prints_headers_key_and_json(kafka: str, log: KafkaLog) -> None:
    """kcat where it is installed, else Kafka's own console consumer."""
    event = samples.signed(samples.epoch())
    log.append([event])
    topic = log.settings.topic(topics.ROUNDS)
    if shutil.which("kcat"):
        command = ["kcat", "-b", kafka, "-C", "-t", topic, "-e", "-q", "-f", r"%h\n%k\n%s\n"]
    else:
        command = [
            *("java", "-cp", f"{brokers._libs()}/*", "org.apache.kafka.tools.consumer.ConsoleConsumer"),
            *("--bootstrap-server", kafka, "--topic", topic, "--from-beginning", "--max-messages", "1"),
            *("--formatter-property", "print.headers=true", "--formatter-property", "print.key=true"),
        ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert event.data.decode() in said
    for shown in (event.id, event.source, event.type, event.key, "application/json"):
        assert shown in said


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_was_appended_is_there_for_every_reader_at_once(kafka_url: str, log: KafkaLog) -> None:
    other = KafkaLog(kafka_url)
    position = START
    for number in range(50):
        payload = samples.epoch(number) if number % 2 else samples.feedback(number, client_id=f"device-{number}")
        event = samples.signed(payload)
        log.append([event])
        batch = other.read(after=position)
        assert [record.id for record in batch.records] == [event.id]
        position = batch.position
    other.close()


def test_events_of_many_partitions_are_read_whole_whatever_the_page(log: KafkaLog) -> None:
    sent = [samples.signed(samples.feedback(number, client_id=f"device-{number % 23}")) for number in range(700)]
    sent += [samples.signed(samples.epoch(number)) for number in range(300)]
    log.append(sent)
    for limit in (1, 7, 250, 5000):
        position, seen, clock = START, set[str](), 0
        while records := (batch := log.read(after=position, limit=limit)).records:
            assert len(records) <= limit
            assert not seen & {record.id for record in records}
            seen |= {record.id for record in records}
            assert records[0].appended_ms >= clock
            position, clock = batch.position, records[-1].appended_ms
        assert seen == {event.id for event in sent}


def test_a_reader_with_too_much_in_hand_loses_and_doubles_nothing(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MOST_BUFFERED_BYTES", 20_000)
    sent = [samples.signed(samples.feedback(number, client_id=f"device-{number % 3}")) for number in range(9000)]
    log.append(sent[:8000])
    sent += [samples.signed(samples.epoch(number)) for number in range(50)]
    log.append(sent[8000:])
    for _ in range(3):
        records = list(read_all(log))
        assert sorted(record.id for record in records) == sorted(event.id for event in sent)
        assert [record.appended_ms for record in records] == sorted(record.appended_ms for record in records)


def test_an_event_that_comes_again_to_a_reader_from_the_middle_is_read_once_more_and_no_fold_minds(log: KafkaLog) -> None:
    event = samples.signed(samples.epoch(1))
    log.append([event])
    position = log.end()
    log.append([samples.signed(samples.epoch(2)), event])
    assert len(ids_of(log)) == 2
    late = KafkaLog(log.url)
    records = list(read_all(late, after=position))
    late.close()
    assert [record.id for record in records][-1] == event.id
    fold, admit = RoundsView(), Admit()
    for record in records:
        if (payload := admit(record)) is not None:
            fold.apply(record, payload)
    assert fold.epoch == 2


def test_repeats_are_forgotten_before_they_fill_the_memory(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "REMEMBERED", 10)
    first = samples.signed(samples.epoch(0))
    log.append([first, *(samples.signed(samples.epoch(number)) for number in range(1, 15)), first])
    assert ids_of(log).count(first.id) == 1
    log.append([*(samples.signed(samples.epoch(number)) for number in range(15, 40)), first])
    assert ids_of(log).count(first.id) == 2


def test_more_readers_than_consumers_are_kept_disturb_each_other_no_more_than_by_time(log: KafkaLog) -> None:
    log.append([samples.signed(payload) for number in range(30) for payload in (samples.epoch(number), samples.seen(seq=number))])
    wanted = [tuple(sorted({topics.ROUNDS, topics.CLIENTS, topics.ALL[number % 7]})) for number in range(14)]
    positions = dict.fromkeys(range(14), START)
    counts = dict.fromkeys(range(14), 0)
    for _ in range(8):
        for number, names in enumerate(wanted):
            batch = log.read(names, positions[number], limit=10)
            positions[number], counts[number] = batch.position, counts[number] + len(batch.records)
    assert set(counts.values()) == {60}


def test_a_transaction_of_another_producer_is_seen_when_it_commits_and_never_if_it_aborts(kafka: str, log: KafkaLog) -> None:
    def produce(producer: Producer, event: Event) -> None:
        producer.produce(log.settings.topic(event.topic), event.data, event.key.encode(), headers=codec.headers(event))

    before, lost, kept, after = (samples.signed(samples.epoch(number)) for number in range(4))
    log.append([before])
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": secrets.token_hex(8)})
    producer.init_transactions(30)
    for event, end in ((lost, producer.abort_transaction), (kept, producer.commit_transaction)):
        producer.begin_transaction()
        produce(producer, event)
        end(30)
    log.append([after])
    assert ids_of(log) == [before.id, kept.id, after.id]
    end = log.end()
    assert all(end.covers(record.stream, record.offset) for record in read_all(log))
    assert log.read((topics.ROUNDS,), end).records == []


def test_a_fold_goes_on_from_its_snapshot_and_reads_nothing_twice(kafka_url: str, log: KafkaLog, tmp_path: Path) -> None:
    log.append([samples.signed(samples.epoch(number)) for number in range(1, 200)])
    reader = Reader(log, RoundsView(), snapshots=Snapshots(tmp_path / "rounds.snapshot"))
    assert reader.catch_up() == 199
    reader.save()
    log.append([samples.signed(samples.epoch(200))])
    again = KafkaLog(kafka_url)
    resumed = Reader(again, RoundsView(), snapshots=Snapshots(tmp_path / "rounds.snapshot"))
    assert resumed.catch_up() == 1
    assert resumed.fold.epoch == 200
    again.close()


def test_a_log_that_lost_what_a_snapshot_has_read_is_refused(log: KafkaLog, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path / "releases.snapshot")
    position = Position({f"{log.settings.topic(topics.RELEASES)}-0": 10})
    kept.save(ReleasesView.version, position, ReleasesView().to_state(), Standing(), {})
    with pytest.raises(LogChangedError, match="ends before event 10"):
        Reader(log, ReleasesView(), snapshots=kept)
    assert Reader(log, ReleasesView(), snapshots=kept, accept_loss=True).position == START


def test_marks_know_every_partition_again_and_what_is_not_the_same(log: KafkaLog) -> None:
    log.append([samples.signed(each) for each in (samples.created(), samples.epoch(1), samples.epoch(2))])
    log.append([samples.signed(samples.feedback(number, client_id=f"device-{number}")) for number in range(20)])
    kept: Marks = {}
    remember(kept, read_all(log))
    assert len(kept) > 5
    assert {mark.lasting for mark in kept[f"{log.settings.topic(topics.ROUNDS)}-0"]} == {True}
    log.append([samples.signed(samples.epoch(3)), samples.signed(samples.feedback(21, client_id="device-1"))])

    def read(after: Position) -> Batch:
        return log.read(after=after, limit=1)

    check(log.end(), read, log.end(), kept)
    for stream, (mark, *_) in kept.items():
        with pytest.raises(LogChangedError, match=f"event {mark.offset} of stream '{stream}'"):
            check(log.end(), read, log.end(), kept | {stream: [msgspec.structs.replace(mark, sha256=bytes(32))]})


def test_a_forked_child_connects_anew(log: KafkaLog, in_child: Callable[[Callable[[], object]], int]) -> None:
    def append() -> None:
        log.append([samples.signed(samples.epoch(2))])
        assert len(ids_of(log)) == 2

    log.append([samples.signed(samples.epoch(1))])
    assert len(ids_of(log)) == 1
    assert in_child(append) == 0
    assert len(ids_of(log)) == 2


# --- sharing ---------------------------------------------------------------------------------------------------------


def _share_until(readers: list[SharedReader], done: Callable[[list[list[str]]], bool], *, commit: bool = True) -> list[list[str]]:
    got: list[list[str]] = [[] for _ in readers]
    deadline = time.monotonic() + 60
    while not done(got):
        assert time.monotonic() < deadline, [len(each) for each in got]
        for reader, mine in zip(readers, got, strict=True):
            records = reader.read(wait_s=0.1)
            mine += [record.id for record in records]
            if commit:
                reader.commit()
    return got


def test_members_of_a_group_share_the_events_and_take_over_what_was_not_committed(kafka_url: str, log: KafkaLog) -> None:
    def share(*readers: SharedReader, done: Callable[[list[list[str]]], bool], commit: bool = True) -> list[list[str]]:
        return _share_until(list(readers), done, commit=commit)

    sent = [samples.signed(samples.feedback(number, client_id=f"device-{number}")) for number in range(60)]
    one, two = (SharedReader(kafka_url, (topics.FEEDBACK,), "workers") for _ in range(2))
    share(one, two, done=lambda got: bool(one.assigned and two.assigned))
    log.append(sent)
    first = share(one, two, done=lambda got: sum(map(len, got)) >= 60)
    assert sorted(first[0] + first[1]) == sorted(event.id for event in sent)
    assert first[0]
    assert first[1]
    more = [samples.signed(samples.feedback(number, client_id=f"device-{number}")) for number in range(60, 120)]
    log.append(more)
    share(one, done=lambda got: bool(got[0]), commit=False)
    one.close()
    (rest,) = share(two, done=lambda got: len(set(got[0])) >= 60)
    assert set(rest) == {event.id for event in more}
    two.close()

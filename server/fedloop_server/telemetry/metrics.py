"""What a running server shows to Prometheus: the server's own folds, read when somebody asks.

No figure names a client, and none is kept in a second book: a server that was killed shows the same figures when it has read its
log again. The names and their meanings are a contract with deploy/grafana.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, Protocol

from fedloop_events import topics
from fedloop_events.envelope import Event
from fedloop_events.folds.releases import ReleaseState
from fedloop_events.folds.rounds import RoundState
from fedloop_events.logs.port import START, Batch, EventLog, Position
from fedloop_tasks.table import TASKS
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedloop_server.config import ServerConfig
from fedloop_server.operations import clients
from fedloop_server.operations.budgets import budget_of
from fedloop_server.operations.registry import summarise
from fedloop_server.operations.rounds import asked_by, waiting
from fedloop_server.state import ServerState

ROUND_BUCKETS_S: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0)


class Serves(Protocol):
    """What is shown of a `fedloop_server.rounds.loop.Server`."""

    config: ServerConfig
    model: str
    epoch: int
    state: ServerState

    @property
    def refused(self) -> int: ...

    @property
    def stale(self) -> int: ...


class MeteredLog:
    """An `EventLog` that counts the events read through it, each once however often it is read, and notes the last read."""

    def __init__(self, log: EventLog) -> None:
        self.read_by_topic: Counter[str] = Counter()
        self._log = log
        self._furthest: dict[tuple[str, str], int] = {}
        self._read_at: float | None = None

    def append(self, events: Sequence[Event]) -> None:
        self._log.append(events)

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        batch = self._log.read(topics, after, limit=limit, wait_s=wait_s)
        for record in batch.records:
            place = (record.stream, record.topic)
            if record.offset > self._furthest.get(place, 0):
                self._furthest[place] = record.offset
                self.read_by_topic[record.topic] += 1
        self._read_at = time.monotonic()
        return batch

    def end(self) -> Position:
        return self._log.end()

    def close(self) -> None:
        self._log.close()

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last read; None before the first."""
        return None if self._read_at is None else time.monotonic() - self._read_at


class ServerCollector:
    """The metrics of one server.

    Asked from another thread than the server's: what grows meanwhile is copied by `list`, which no other thread interrupts.
    """

    def __init__(self, server: Serves, log: MeteredLog, clock: Callable[[], float] = time.time) -> None:
        self._server, self._log, self._clock = server, log, clock

    def collect(self) -> Iterator[Metric]:
        yield from self._loop()
        rounds = list(self._server.state.rounds.rounds.values())
        yield from _rounds(rounds)
        yield from _participation(rounds)
        wanted = waiting(self._server.state.rounds)
        yield GaugeMetricFamily("fedloop_rounds_waiting", "Rounds that were requested and have not begun.", wanted)
        asked = (asked_by(each) for each in list(self._server.state.rounds.requests))
        yield total("fedloop_round_requests", "Requests for rounds, by who asked.", "by", asked)
        yield from self._releases()
        yield from self._clients()

    def _loop(self) -> Iterator[Metric]:
        server = self._server
        yield GaugeMetricFamily(
            "fedloop_epoch", "The epoch in which this server decides; 0 before it has begun one.", server.epoch
        )
        read = CounterMetricFamily("fedloop_events_read", "Events read from the log since this process began.", labels=["topic"])
        for topic in topics.ALL:
            read.add_metric([topic], self._log.read_by_topic[topic])
        yield read
        refused = "Events since this process began that are malformed, or not authentic."
        yield CounterMetricFamily("fedloop_events_refused", refused, server.refused)
        stale = "Decisions in the log by servers that another one had taken over from."
        yield CounterMetricFamily("fedloop_decisions_stale", stale, server.stale)
        idle = GaugeMetricFamily("fedloop_loop_idle_seconds", "Seconds since the server last read its log.")
        if (idle_s := self._log.idle_s) is not None:
            idle.add_metric([], idle_s)
        yield idle

    def _releases(self) -> Iterator[Metric]:
        view, model = self._server.state.releases, self._server.model
        found = [summarise(view, each) for each in list(view.releases.values()) if each.model == model]
        meaning = "Releases of the model, and candidates for one."
        yield _by("fedloop_releases", meaning, "state", (each.status for each in found), STANDINGS)
        number = GaugeMetricFamily("fedloop_release_number", "The number of the release in force.")
        shown: list[tuple[str, ReleaseState]] = []
        current = view.current(model)
        if current is not None:
            number.add_metric([], current.number)
            shown.append(("in_force", current))
        if found:
            last = max(found, key=lambda each: each.number)
            shown.append(("last", view.releases[last.release]))
        yield number
        yield from _evaluations(shown)

    def _clients(self) -> Iterator[Metric]:
        state, config = self._server.state, self._server.config
        counts = clients.count(state.people, state.ledger, config.availability_s, self._clock() * 1000)
        yield GaugeMetricFamily("fedloop_clients_enrolled", "Clients that were ever enrolled.", counts.enrolled)
        yield GaugeMetricFamily("fedloop_clients_revoked", "Revoked clients.", counts.revoked)
        meaning = "Clients that were seen lately enough to be asked."
        yield GaugeMetricFamily("fedloop_clients_available", meaning, counts.available)
        meaning = "Clients whose record of spends was forked or torn."
        yield GaugeMetricFamily("fedloop_clients_suspended", meaning, counts.suspended)
        share = GaugeMetricFamily(
            "fedloop_budget_share_max", "The largest share of its privacy budget (epsilon) that any client has spent for good."
        )
        # Equal histories cost one computation, which the accountant remembers; the scheduler has mostly asked for it already.
        limited = [each for each in list(state.people.clients.values()) if each.epsilon is not None]
        shares = [found for each in limited if (found := budget_of(state.ledger, each).share) is not None]
        if shares:
            share.add_metric([], max(shares))
        yield share


ROUND_STATES: Final = ("open", "closed", "aborted")
STANDINGS: Final = ("proposed", "published", "rejected", "withdrawn")


def registry(server: Serves, log: MeteredLog) -> CollectorRegistry:
    """The server's metrics, and the process's own."""
    return registry_of(ServerCollector(server, log))


def registry_of(collector: Collector) -> CollectorRegistry:
    """What a collector gives, and the process's own metrics."""
    made = CollectorRegistry()
    made.register(collector)
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    return made


def _rounds(rounds: Sequence[RoundState]) -> Iterator[Metric]:
    yield _by("fedloop_rounds", "Rounds.", "state", (each.state for each in rounds), ROUND_STATES)
    seconds = [(each.ended_ms - each.opened_ms) / 1000 for each in rounds if each.opened is not None and each.ended_ms]
    buckets = [(f"{bound:g}", float(sum(each <= bound for each in seconds))) for bound in ROUND_BUCKETS_S]
    took = HistogramMetricFamily("fedloop_round_seconds", "Seconds from a round's opening to its end.")
    took.add_metric([], [*buckets, ("+Inf", float(len(seconds)))], sum(seconds))
    yield took
    up, down = sum(each.bytes_up for each in rounds), sum(each.bytes_down for each in rounds)
    yield CounterMetricFamily("fedloop_upload_bytes", "Bytes of the adapter updates that were accepted.", up)
    yield CounterMetricFamily("fedloop_download_bytes", "Bytes of the releases that clients were asked to load.", down)


def _participation(rounds: Sequence[RoundState]) -> Iterator[Metric]:
    counted = sum(len(each.participants) for each in rounds)
    yield CounterMetricFamily("fedloop_updates_counted", "Adapter updates that count, over all rounds.", counted)
    last = next((each for each in reversed(rounds) if each.state != "open"), None)
    asked = GaugeMetricFamily("fedloop_last_round_cohort", "Clients that the last finished round asked.")
    count = GaugeMetricFamily("fedloop_last_round_participants", "Clients whose updates count in it.")
    if last is not None:
        asked.add_metric([], len(last.opened.cohort) if last.opened is not None else 0)
        count.add_metric([], len(last.participants))
    yield asked
    yield count
    excluded = (_code(exclusion.reason) for each in rounds for exclusion in each.excluded.values())
    yield total("fedloop_exclusions", "Times that a client did not count in a round, by why.", "reason", excluded)
    refused = (_code(update.reason) for each in rounds for update in list(each.refused.values()))
    yield total("fedloop_updates_refused", "Adapter updates that were refused, by why.", "reason", refused)


def _code(reason: str) -> str:
    """A reason in the server's own words. What a client that declined gave as its reason could be anything, and is not shown."""
    return "declined" if reason.startswith("declined.") else reason


def _evaluations(shown: Iterable[tuple[str, ReleaseState]]) -> Iterator[Metric]:
    """A gauge for each metric of a task, such as fedloop_release_accuracy."""
    for metric in sorted({name for task in TASKS.values() for name in task.metrics}):
        meaning = f"The {metric} on the held-out messages: of the release in force, and of the candidate made last."
        gauge = GaugeMetricFamily(f"fedloop_release_{metric}", meaning, labels=["release"])
        for which, release in shown:
            found = None if release.evaluation is None else release.evaluation.metrics.get(metric)
            if found is not None:
                gauge.add_metric([which], found)
        yield gauge


def _by(name: str, meaning: str, label: str, found: Iterable[str], known: Iterable[str]) -> Metric:
    """How many there are now of each kind; 0 for a kind of which there is none."""
    counts, gauge = Counter(found), GaugeMetricFamily(name, meaning, labels=[label])
    for each in known:
        gauge.add_metric([each], counts[each])
    return gauge


def total(name: str, meaning: str, label: str, found: Iterable[str]) -> Metric:
    """How often each was found; of counts that were made elsewhere, these."""
    counter = CounterMetricFamily(name, meaning, labels=[label])
    for each, count in sorted(Counter(found).items()):
        counter.add_metric([each], count)
    return counter

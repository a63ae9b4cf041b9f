"""Real Kafka for the tests that ask for it (fixtures `kafka`, `kafka_url`, `secure_kafka`, or the marker `kafka`).

The broker is the one that FEDLOOP_TEST_KAFKA=HOST:PORT names, else one of our own where Java and Maven are, else a container
where Docker runs. Where none of them is, these tests are left out: the last line says so, and with CI=true the run fails.
llama.cpp is asked for by the marker `llama_cpp`; where it is not installed, those tests are left out, and a line says so.

With `-n 2` (pytest-xdist) each worker is a session: it has brokers of its own, and what it left out the run as a whole says.
"""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads that share a busy core wait for each other

import secrets
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final

import brokers
import containers
import pytest
from brokers import Cluster
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

settings.register_profile("fedloop", deadline=None)  # what an example takes is up to what else the machine does
settings.load_profile("fedloop")

VARIABLE: Final = "FEDLOOP_TEST_KAFKA"
ANSWER_S: Final = 30.0
_KAFKA: Final = "Kafka"
_LLAMA_CPP: Final = "llama.cpp"
_LEFT_OUT: Final = pytest.StashKey[dict[str, str]]()
"""What the line about them says, by what they want."""


class _InternalErrors:
    """xdist can end a run with status 0 though pytest itself failed in every worker, so that no test was run."""

    def __init__(self) -> None:
        self.seen = False

    def pytest_internalerror(self) -> None:
        self.seen = True


_INTERNAL_ERRORS: Final = pytest.StashKey[_InternalErrors]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kafka: needs a real Kafka broker (added by itself to tests that use its fixtures)")
    config.addinivalue_line("markers", "llama_cpp: needs llama.cpp (CMAKE_ARGS=-DGGML_NATIVE=OFF pip install llama-cpp-python)")
    config.stash[_INTERNAL_ERRORS] = _InternalErrors()
    config.pluginmanager.register(config.stash[_INTERNAL_ERRORS])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Mark before `-m` is looked at, and leave out after it: only what was asked for counts as left out."""
    for item in items:
        if {"kafka", "secure_kafka"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")
    yield
    left_out = config.stash.setdefault(_LEFT_OUT, {})
    _leave_out_llama_cpp(config, items, left_out)
    _leave_out_kafka(config, items, left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out
        # Who may take long begins early: else one worker is left alone with it at the end.
        items.sort(key=_allowed_s, reverse=True)


def _leave_out_kafka(config: pytest.Config, items: list[pytest.Item], left_out: dict[str, str]) -> None:
    wanting = [item for item in items if item.get_closest_marker("kafka")]
    reason = brokers.why_not() if wanting else ""
    if not reason:
        return
    # Those that ask for nothing but a broker can do with anybody's; the others start and break their own.
    if os.environ.get(VARIABLE) or not containers.why_not():
        wanting = [item for item in wanting if "kafka" not in getattr(item, "fixturenames", ())]
    else:
        reason += f", no Docker, and {VARIABLE} names none"
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
        left_out[_KAFKA] = f"{len(wanting)} Kafka tests were left out: {reason}"


def _leave_out_llama_cpp(config: pytest.Config, items: list[pytest.Item], left_out: dict[str, str]) -> None:
    """llama.cpp is optional in CI too: no wheel of it is published, and it takes minutes to build."""
    wanting = [item for item in items if item.get_closest_marker("llama_cpp")]
    if wanting and importlib.util.find_spec("llama_cpp") is None:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
        left_out[_LLAMA_CPP] = f"{len(wanting)} llama.cpp tests were left out: llama-cpp-python is not installed"


def _allowed_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Each worker has collected the same tests: what one of them left out, all did."""
    node.config.stash.setdefault(_LEFT_OUT, {}).update(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    yield
    left_out = session.config.stash.get(_LEFT_OUT, {})
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # of a worker
        return
    if session.config.stash[_INTERNAL_ERRORS].seen:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
    if _LLAMA_CPP in left_out:
        reporter.write_line(left_out[_LLAMA_CPP], yellow=True)
    if line := left_out.get(_KAFKA):
        if os.environ.get("CI") == "true":
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            line = f"FAILED: {line}"
        reporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap address of a broker that all tests of this run share: use topics of your own."""
    named = os.environ.get(VARIABLE)
    if named:
        try:
            AdminClient({"bootstrap.servers": named, "log_level": 0}).list_topics(timeout=ANSWER_S)
        except KafkaException:
            pytest.fail(f"no broker answers at {VARIABLE}={named}")
        yield named
        return
    own = not brokers.why_not()
    with Cluster(tmp_path_factory.mktemp("kafka")) if own else containers.Container() as broker:
        yield broker.bootstrap


@pytest.fixture
def kafka_url(kafka: str) -> Iterator[str]:
    """The location of a log that is this test's alone; its topics are deleted afterwards."""
    prefix = f"test-{secrets.token_hex(8)}"
    yield f"kafka://{kafka}/{prefix}"
    admin = AdminClient({"bootstrap.servers": kafka})
    topics = [name for name in admin.list_topics(timeout=ANSWER_S).topics if name.startswith(f"{prefix}.")]
    for deleted in admin.delete_topics(topics).values() if topics else ():
        deleted.result(ANSWER_S)


@pytest.fixture(scope="session")
def secure_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker with TLS, SCRAM and ACLs, which all tests of this run share: use topics and users of your own."""
    with Cluster(tmp_path_factory.mktemp("secure"), secure=True) as cluster:
        yield cluster


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Run something in a forked process that ends with it; minus the signal that killed it, or its exit status."""

    def run(work: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run

"""`fedloop gateway` when the call is wrong. That it serves is tested with its kills."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from fedloop_cli import main
from fedloop_cli.provisioning.certificates import make_ca
from fedloop_events.locations import open_log
from gateway.harness import provision


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    log = open_log(tmp_path / "deployment", create=True)
    provision(log)
    log.close()
    return tmp_path / "deployment"


def test_without_tls_it_serves_this_machine_alone(deployment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert main.run(["gateway", str(deployment), "--host", host]) == 2
        assert "without TLS" in capsys.readouterr().err


def test_a_certificate_without_its_key_is_refused(deployment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (make_ca(tmp_path / name).issue("g", ["localhost"], tmp_path / name) for name in ("one", "other"))
    files = [
        (["--tls-cert", str(one.certificate)], "go together"),
        (["--tls-cert", str(one.certificate), "--tls-key", str(other.key)], "no certificate and its key"),
        (["--tls-cert", str(one.key), "--tls-key", str(one.key)], "no certificate and its key"),
        (["--tls-cert", str(tmp_path / "none"), "--tls-key", str(one.key)], "no certificate and its key"),
    ]
    for arguments, message in files:
        assert main.run(["gateway", str(deployment), *arguments]) == 2
        assert message in capsys.readouterr().err
    one.key.chmod(0o644)
    assert main.run(["gateway", str(deployment), "--tls-cert", str(one.certificate), "--tls-key", str(one.key)]) == 2
    assert "can be used by others" in capsys.readouterr().err


def test_what_is_no_deployment_or_no_address_is_refused(
    deployment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(tmp_path / "empty", create=True).close()
    assert main.run(["gateway", str(tmp_path / "none")]) == 2
    assert main.run(["gateway", str(tmp_path / "empty"), "--port", "0"]) == 2
    assert "belongs to no deployment" in capsys.readouterr().err
    assert main.run(["gateway", "--log", "https://example.org"]) == 2
    assert "not before a gateway" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main.run(["gateway", str(deployment), "--port", str(taken.getsockname()[1])]) == 3
    assert "cannot listen" in capsys.readouterr().err

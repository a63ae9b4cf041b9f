"""The development authority: what it issues holds in real TLS handshakes, and its keys stay private."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fedloop_cli.doctor.findings import valid_until
from fedloop_cli.provisioning.certificates import CA, Issued, make_ca
from fedloop_events.errors import UsageError


@pytest.fixture
def ca(tmp_path: Path) -> CA:
    return make_ca(tmp_path / "ca")


def handshake(server: Issued, client_ca: Path, host: str, client: Issued | None = None, *, server_ca: Path | None = None) -> None:
    """A TLS handshake over a socket pair. Raises `ssl.SSLError` as the client saw it."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=server_ca)
    serving.load_cert_chain(server.certificate, server.key)
    serving.verify_mode = ssl.CERT_REQUIRED if server_ca is not None else ssl.CERT_NONE
    calling = ssl.create_default_context(cafile=client_ca)
    if client is not None:
        calling.load_cert_chain(client.certificate, client.key)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with serving.wrap_socket(theirs, server_side=True) as accepted:
                accepted.sendall(b"x")
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with calling.wrap_socket(ours, server_hostname=host) as called:
            assert called.recv(1) == b"x"
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_server_certificate_holds_on_the_hosts_it_names_and_nowhere_else(ca: CA, tmp_path: Path, host: str) -> None:
    issued = ca.issue("broker-1", ["localhost", "127.0.0.1"], tmp_path)
    handshake(issued, ca.certificate, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, ca.certificate, "elsewhere.example")


def test_another_authority_is_not_believed(ca: CA, tmp_path: Path) -> None:
    issued = ca.issue("broker-1", ["localhost"], tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, make_ca(tmp_path / "other").certificate, "localhost")


def test_a_client_certificate_is_taken_as_a_client_and_refused_as_a_server(ca: CA, tmp_path: Path) -> None:
    server, client = ca.issue("broker-1", ["localhost"], tmp_path), ca.issue("agent-1", [], tmp_path)
    handshake(server, ca.certificate, "localhost", client, server_ca=ca.certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client, ca.certificate, "localhost")


def test_keys_can_be_read_by_their_owner_alone(ca: CA, tmp_path: Path) -> None:
    issued = ca.issue("broker-1", ["localhost"], tmp_path)
    for private in (issued.key, issued.keystore, ca.certificate.with_name("ca.key")):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" not in issued.certificate.read_bytes() + ca.certificate.read_bytes()
    assert issued.keystore.read_bytes() == issued.key.read_bytes() + issued.certificate.read_bytes()


def test_asking_again_changes_nothing(ca: CA, tmp_path: Path) -> None:
    issued = ca.issue("broker-1", ["localhost"], tmp_path)
    before = [path.read_bytes() for path in (*issued, ca.certificate)]
    again = make_ca(tmp_path / "ca")
    assert again.issue("broker-1", ["localhost"], tmp_path) == issued
    assert [path.read_bytes() for path in (*issued, ca.certificate)] == before


@pytest.mark.parametrize("change", ["other hosts", "other authority", "ends soon", "no key", "half a keystore", "open key"])
def test_a_certificate_that_does_not_hold_any_more_is_issued_anew(ca: CA, tmp_path: Path, change: str) -> None:
    issued = ca.issue("broker-1", ["localhost"], tmp_path, days=29 if change == "ends soon" else 365)
    before = issued.certificate.read_bytes()
    if change == "no key":
        issued.key.unlink()
    elif change == "half a keystore":
        issued.keystore.write_bytes(issued.key.read_bytes())
    elif change == "open key":
        issued.key.chmod(0o644)
    authority = make_ca(tmp_path / "other") if change == "other authority" else ca
    hosts = ["127.0.0.1"] if change == "other hosts" else ["localhost"]
    authority.issue("broker-1", hosts, tmp_path)
    assert issued.certificate.read_bytes() != before
    handshake(issued, authority.certificate, hosts[0])


@pytest.mark.parametrize("change", ["no key", "open key", "another's key", "no certificate", "nonsense"])
def test_an_authority_that_is_damaged_is_refused_and_never_replaced(ca: CA, tmp_path: Path, change: str) -> None:
    key = ca.certificate.with_name("ca.key")
    if change == "no key":
        key.unlink()
    elif change == "open key":
        key.chmod(0o640)
    elif change == "another's key":
        make_ca(tmp_path / "other")
        (tmp_path / "other" / "ca.key").replace(key)
    elif change == "no certificate":
        ca.certificate.unlink()
    else:
        ca.certificate.write_bytes(b"nonsense")
    left = {path: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    with pytest.raises(UsageError):
        make_ca(tmp_path / "ca")
    assert {path: path.read_bytes() for path in (tmp_path / "ca").iterdir()} == left


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\n", "x" * 61])
def test_a_name_that_is_no_file_name_is_refused(ca: CA, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        ca.issue(name, ["localhost"], tmp_path)


def test_the_end_of_a_certificate_is_read_from_its_file(ca: CA, tmp_path: Path) -> None:
    issued = ca.issue("broker-1", ["localhost"], tmp_path, days=10)
    assert abs(valid_until(issued.certificate) - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=1)
    with pytest.raises(UsageError):
        valid_until(issued.key)
    with pytest.raises(UsageError):
        valid_until(tmp_path / "absent.pem")

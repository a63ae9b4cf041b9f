"""`fedloop gateway`: a deployment's log and blobs over HTTPS, for devices that hold no connection to its broker."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from fedloop_cli import console, options


def gateway(
    where: options.DeploymentFolder,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 or :: for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8443,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM, for nobody else to read).")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="A reverse proxy before this gateway, or a network of them; may be given several times. Its X-Forwarded-For is "
            "believed, and its connections are not bound by address.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Let devices reach a deployment through HTTPS: `fedloop agent enrol --log https://HOST --store STORE`.

    It holds no device's key. Every request is signed by the device that makes it, which reads and appends what is its own, and no
    more. Ctrl-C or SIGTERM ends it when what had begun is answered. Without TLS it serves this machine alone.
    """
    from fedloop_events import locations
    from fedloop_events.errors import UsageError

    tls = _tls(tls_cert, tls_key)
    if tls is None and not _is_loopback(host):
        raise UsageError(
            f"without TLS the gateway does not listen at {host}, where others are",
            hint="give --tls-cert and --tls-key, or --host 127.0.0.1",
        )
    proxies = [_network(each) for each in proxy or ()]
    if where.place.log.startswith(("https://", "http://")):
        raise UsageError("a gateway stands before a log, not before a gateway", hint="name the log itself with --log")
    try:
        from fedloop_server.gateway import create_app
        from fedloop_server.gateway.listening import serve
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the gateway needs the package {error.name}, which is not installed", hint="pip install 'fedloop[gateway]'"
        ) from None

    log, blobs = locations.open_log(where.place.log), locations.open_blobs(where.place.blobs)

    def listening(address: str) -> None:
        document = {"address": address, "log": where.place.log, "blobs": where.place.blobs}
        console.show(document, f"listening at {address}", as_json=json)

    try:
        interrupted = serve(create_app(log, blobs), host=host, port=port, tls=tls, proxies=proxies, on_listening=listening)
    finally:
        log.close()
    if interrupted:
        raise typer.Exit(130)


def _tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    from fedloop_events.errors import UsageError
    from fedloop_events.files import quoted

    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if certificate is None or key is None:
        return None
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"{certificate} and {key} are no certificate and its key",
            cause=getattr(error, "reason", None) or error.strerror or "",
        ) from None
    if key.stat().st_mode & 0o077:
        raise UsageError(f"the key {key} can be used by others", hint=f"chmod 600 {quoted(key)}")
    return certificate, key


def _network(given: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    from fedloop_events.errors import UsageError

    try:
        return ipaddress.ip_network(given)
    except ValueError as error:
        raise UsageError(
            f"--proxy {given} is no address and no network", cause=str(error), hint="as in 10.0.0.7 or 10.0.0.0/24"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

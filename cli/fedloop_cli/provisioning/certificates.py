"""A certificate authority for development, and the server and client certificates that it issues (X.509v3, EC P-256, PEM).

It is for one machine or one test bed: its key lies in a file. In production, certificates come from your own authority.
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fedloop_events.errors import UsageError
from fedloop_events.files import quoted, reason, write_private

CA_DAYS: Final = 3650
LEAF_DAYS: Final = 365
RENEW_DAYS: Final = 30
"""A certificate that ends sooner than this is issued anew."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class Issued(NamedTuple):
    """The files of one certificate: the certificate, its key (0600), and both in one file (0600), as Kafka's PEM keystore."""

    certificate: Path
    key: Path
    keystore: Path


class CA:
    """An authority whose files are `certificate` (everybody may have it) and the key beside it (nobody else may)."""

    def __init__(self, certificate: Path, parsed: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._parsed, self._key = parsed, key

    def issue(self, name: str, hosts: Sequence[str], folder: Path, *, days: int = LEAF_DAYS) -> Issued:
        """A certificate for `name`, good on `hosts` (DNS names, IP addresses) and as a client; without hosts as a client only.

        What lies in `folder` already is kept if this authority gave it for these hosts and it has 30 days left. Raises
        `UsageError` for a name that is none, or a folder that cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot name a certificate",
                hint="use 1 to 60 ASCII letters, digits, ., - or _, beginning with a letter or digit",
            )
        issued = Issued(folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.keystore.pem")
        alternatives = [_general_name(host) for host in hosts]
        if not self._stands(issued, alternatives):
            key = generate_private_key(SECP256R1())
            certificate = self._sign(name, alternatives, key, days)
            _write(folder, {issued.key: _pem(key), issued.keystore: _pem(key) + _pem(certificate)})
            _write(folder, {issued.certificate: _pem(certificate)}, mode=0o644)
        return issued

    def _stands(self, issued: Issued, alternatives: list[x509.GeneralName]) -> bool:
        try:
            found = x509.load_pem_x509_certificate(issued.certificate.read_bytes())
            key = _load_key(issued.key)
            found.verify_directly_issued_by(self._parsed)
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value if alternatives else ()
            both = issued.keystore.read_bytes()
        except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, UsageError):
            return False
        left = found.not_valid_after_utc - datetime.now(UTC)
        return (
            left > timedelta(days=RENEW_DAYS)
            and list(names) == alternatives
            and found.public_key() == key.public_key()
            and both == _pem(key) + _pem(found)
        )

    def _sign(self, name: str, alternatives: list[x509.GeneralName], key: EllipticCurvePrivateKey, days: int) -> x509.Certificate:
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if alternatives else [])]
        builder = (
            _builder(name, self._parsed.subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def make_ca(folder: Path) -> CA:
    """The authority in `folder` (`ca.pem`, `ca.key`), made if there is none.

    Raises `UsageError` if the one that is there is half, expired, or its key can be read by others: a new one would cut off all
    whom it certified, so that is for a person to decide.
    """
    certificate, key_file = folder / "ca.pem", folder / "ca.key"
    if certificate.exists() or key_file.exists():
        return _load_ca(certificate, key_file)
    key = generate_private_key(SECP256R1())
    name = "Fedloop development CA"
    parsed = (
        _builder(name, _subject(name), key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, {key_file: _pem(key)})
    _write(folder, {certificate: _pem(parsed)}, mode=0o644)
    return CA(certificate, parsed, key)


def _load_ca(certificate: Path, key_file: Path) -> CA:
    hint = (
        f"restore the folder {certificate.parent} from a backup; or delete it and run this again, which certifies everybody anew"
    )
    try:
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        key = _load_key(key_file)
    except (OSError, ValueError, TypeError):
        raise UsageError(f"the certificate authority in {certificate.parent} cannot be read", hint=hint) from None
    if parsed.public_key() != key.public_key():
        raise UsageError(f"{key_file} is not the key of {certificate}", hint=hint)
    if parsed.not_valid_after_utc < datetime.now(UTC):
        raise UsageError(f"the certificate authority {certificate} has expired", hint=hint)
    return CA(certificate, parsed, key)


def _load_key(path: Path) -> EllipticCurvePrivateKey:
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"the key {path} can be used by others", hint=f"chmod 600 {quoted(path)}")
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("no EC key")
    return key


def _builder(name: str, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A day back, for machines whose clock is behind.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise UsageError(f"{host!r} is no host name", hint="write other alphabets in their xn-- form") from None


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(what: x509.Certificate | EllipticCurvePrivateKey) -> bytes:
    if isinstance(what, x509.Certificate):
        return what.public_bytes(serialization.Encoding.PEM)
    return what.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(folder: Path, files: dict[Path, bytes], *, mode: int = 0o600) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            write_private(path, data)
            path.chmod(mode)
    except OSError as error:
        raise UsageError(f"the certificates in {folder} cannot be written", cause=reason(error, folder / "x")) from error

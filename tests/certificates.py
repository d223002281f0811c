"""Certificates for tests: an authority that issues them for servers and for users."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NOW = datetime.datetime.now(datetime.UTC)
_DAY = datetime.timedelta(days=1)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


class Authority:
    """A certificate authority; its own certificate is at ``root``.

    Args:
        directory: where its files go; ``<name>.crt`` and ``<name>.key`` of what it issues.
        name: its own name, and that of its files.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.root = directory / f"{name}.crt"
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - 3 * _DAY)
            .not_valid_after(_NOW + _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.root.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, common_name: str, dns_name: str | None = None, *, file: str = "") -> tuple[Path, Path]:
        """(certificate, key) for a user of that name or, with *dns_name*, for a server that is reached by it."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(_name(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - 2 * _DAY)
            .not_valid_after(_NOW + _DAY)
        )
        if dns_name is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        paths = (self._directory / f"{file or common_name}.crt", self._directory / f"{file or common_name}.key")
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].touch(0o600)
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths

    def revoke(self, certificate: Path) -> Path:
        """Path of a list of revoked certificates that has *certificate* on it."""
        serial = x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_NOW - _DAY).build()
        listed = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(self._name))
            .last_update(_NOW - _DAY)
            .next_update(_NOW + _DAY)
            .add_revoked_certificate(revoked)
            .sign(self._key, hashes.SHA256())
        )
        path = self._directory / f"{self._name}.crl"
        path.write_bytes(listed.public_bytes(serialization.Encoding.PEM))
        return path

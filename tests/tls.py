"""Certificates for tests: a CA, and a server certificate for the loopback address."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificates:
    ca: Path
    certificate: Path
    key: Path

    @property
    def key_and_certificate(self) -> Path:
        """Key and certificate in one file, as Kafka needs them."""
        both = self.key.with_name("both.pem")
        both.write_text(self.key.read_text() + self.certificate.read_text())
        both.chmod(0o600)
        return both


def make_certificates(directory: Path) -> Certificates:
    """Make a certificate for `127.0.0.1`, signed by a CA that nothing else trusts."""
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    made = Certificates(ca, directory / "server.pem", directory / "server.key")
    _openssl(ca, ca_key, "-subj", "/CN=a CA of tests")
    signed = ["-CA", str(ca), "-CAkey", str(ca_key), "-addext", "subjectAltName=IP:127.0.0.1"]
    _openssl(made.certificate, made.key, "-subj", "/CN=a server of tests", *signed)
    return made


def _openssl(certificate: Path, key: Path, *options: str) -> None:
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
    subprocess.run(
        ["openssl", "req", "-x509", "-days", "2", *new_key, "-out", str(certificate), *options],
        check=True,
        capture_output=True,
    )

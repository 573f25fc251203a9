"""Owns throw-away certificates for tests: a CA, and a certificate of it for 127.0.0.1."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from service_kit.config import SecurityConfig

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificates:
    ca: Path
    cert: Path
    key: Path

    def security(self) -> SecurityConfig:
        return SecurityConfig(tls_ca=self.ca, tls_cert=self.cert, tls_key=self.key)


def make(directory: Path) -> Certificates:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    openssl("req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test-ca", "-days", "2")
    openssl("req", *_KEY, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=own")
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        *("x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "own.pem", "-days", "2", "-extfile", "san"),
    )
    return Certificates(directory / "ca.pem", directory / "own.pem", directory / "own.key")

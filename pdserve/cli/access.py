"""Owns reaching a cluster: which URL and gRPC address, which key, which certificate to trust."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import httpx

from pdserve.cli.cluster_state import running_state
from pdserve.cli.record import Record
from pdserve.errors import InternalError, PdserveError, Unavailable, error_from_reason

KEY_VARIABLES = ("PDSERVE_API_KEY", "PDSERVE_API_KEYS")
CONNECT_S = 5.0
STATUS_PATH = "/api/v1/status"


@dataclass(frozen=True, slots=True)
class Access:
    api_url: str
    grpc_address: str
    api_key: str | None = None
    trusted_pem: Path | None = None  # certificate or CA of a TLS cluster

    def http(self, timeout_s: float) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        return httpx.Client(
            base_url=self.api_url, headers=headers, timeout=timeout, verify=self._verify(), trust_env=False
        )

    def _verify(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=self.trusted_pem) if self.trusted_pem is not None else True


def api_key_from_environment() -> str | None:
    """PDSERVE_API_KEY, else the first of PDSERVE_API_KEYS."""
    for variable in KEY_VARIABLES:
        key = os.environ.get(variable, "").split(",")[0].strip()
        if key:
            return key
    return None


def local_access(state_dir: Path) -> Access:
    """Of the cluster that runs in `state_dir`. Raises Unavailable where none does."""
    state = running_state(state_dir)
    return Access(state.api_url, state.grpc_address, api_key_from_environment(), _trusted(state_dir))


def _trusted(state_dir: Path) -> Path | None:
    """What the cluster's own configuration trusts: its CA, else its own certificate."""
    try:
        security = Record.parse((state_dir / "config.json").read_bytes()).record("security")
    except FileNotFoundError:
        return None
    for name in ("tls_ca", "tls_cert"):
        if security.has(name):
            return Path(security.text(name))
    return None


def answer_of(response: httpx.Response) -> Record:
    """The body of a good answer; the typed error of a bad one."""
    if response.is_success:
        return Record.parse(response.content)
    raise error_of(response.status_code, response.content)


def error_of(status: int, body: bytes) -> PdserveError:
    try:
        error = Record.parse(body).record("error")
        hint = f" Here: set {KEY_VARIABLES[0]}." if status == HTTPStatus.UNAUTHORIZED else ""
        return error_from_reason(error.text("code"), error.text("message") + hint)
    except InternalError:
        return InternalError(f"HTTP {status}: {body[:300].decode(errors='replace')}")


def get(http: httpx.Client, path: str) -> Record:
    """GET, as a record. Raises Unavailable where nobody answers, else what the answer says."""
    try:
        return answer_of(http.get(path))
    except httpx.HTTPError as error:
        raise _silent(http, path, error) from error


def get_rows(http: httpx.Client, path: str) -> list[Record]:
    """GET of a JSON array. Raises like `get`."""
    try:
        response = http.get(path)
    except httpx.HTTPError as error:
        raise _silent(http, path, error) from error
    if not response.is_success:
        raise error_of(response.status_code, response.content)
    return Record.parse(b'{"rows":' + response.content + b"}").records("rows")


def post(http: httpx.Client, path: str, body: dict[str, object], request_id: str = "") -> Record:
    """POST, as a record. Raises like `get`."""
    headers = {"x-request-id": request_id} if request_id else {}
    try:
        return answer_of(http.post(path, json=body, headers=headers))
    except httpx.HTTPError as error:
        raise _silent(http, path, error) from error


def reaching_grpc(access: Access) -> Access:
    """With the gRPC address that the API tells, where none was given. Raises like `get`."""
    if access.grpc_address:
        return access
    with access.http(CONNECT_S) as http:
        return replace(access, grpc_address=get(http, STATUS_PATH).text("grpc_address"))


def _silent(http: httpx.Client, path: str, error: httpx.HTTPError) -> Unavailable:
    look = "doctor" if path == STATUS_PATH else "status"
    return Unavailable(f"{str(http.base_url).rstrip('/')}{path} does not answer ({error}). See: pdserve {look}")

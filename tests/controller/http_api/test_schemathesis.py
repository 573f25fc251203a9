"""The OpenAPI document is true: schemathesis finds neither a server error nor an undocumented status, type or shape."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.controller.http_api.server import ApiServer

pytestmark = pytest.mark.slow  # hundreds of generated requests

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 40


def test_every_operation_keeps_to_its_documentation(api: ApiServer) -> None:
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) >= 22
    for operation in operations:
        cases = st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def check(case: schemathesis.Case) -> None:  # type: ignore[type-arg]
            case.call_and_validate(checks=CHECKS, timeout=20)

        check()


def test_the_document_names_bodies_answers_and_statuses(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]
    assert {"200", "400", "401", "403", "404", "413", "429", "500", "503", "504"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "prompt" in document["components"]["schemas"][reference.rsplit("/", 1)[1]]["required"]

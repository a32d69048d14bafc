"""Our own OpenAPI document, and what a fuzzer that reads it makes of the server."""

from collections.abc import Iterator

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fake_engine import FakeEngine
from live_server import live
from zimage_fp8.protocol import ErrorAnswer
from zimage_fp8.serve import ServeOptions, build_app

OPERATIONS = {
    "/v1/images/generations": "post",
    "/v1/images/edits": "post",
    "/v1/pictures/{name}": "get",
    "/v1/models": "get",
    "/v1/models/{name}": "get",
    "/health": "get",
    "/ready": "get",
    "/version": "get",
    "/metrics": "get",
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = FakeEngine()
    options = ServeOptions(max_waiting=100, max_pixels=512 * 512)
    with live(build_app(engine, options)) as server:
        yield server.url


def test_the_document_tells_every_route_and_no_422(url: str) -> None:
    document = httpx2.get(f"{url}/openapi.json", trust_env=False).json()
    for path, method in OPERATIONS.items():
        responses = document["paths"][path][method]["responses"]
        assert "422" not in responses
        assert responses["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
            ErrorAnswer.__name__
        )
    edit = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert set(edit) == {"application/json", "multipart/form-data"}
    assert edit["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert "$defs" not in str(edit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the fuzzer's own libraries
@pytest.mark.parametrize(("path", "method"), OPERATIONS.items())
def test_schemathesis(url: str, path: str, method: str) -> None:
    """No 5xx, no hang, and every answer is one that the document tells."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path][method.upper()]
    cases = schemathesis.generation.GenerationMode
    strategy = operation.as_strategy(generation_mode=cases.NEGATIVE) | operation.as_strategy(
        generation_mode=cases.POSITIVE
    )

    @settings(
        max_examples=100 if method == "post" else 25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def ask(case: schemathesis.Case) -> None:
        response = case.call(timeout=20)
        case.validate_response(response, checks=CHECKS)

    ask()

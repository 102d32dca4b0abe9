"""The OpenAPI document says what the server takes and answers, and refers to nothing that is not in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cappy_engine.serving.dialects.routes import ROUTES
from cappy_engine.serving.openapi import ERRORS, LOOKS, describe

DOCUMENT = describe(ROUTES, "1.0", needs_key=True)


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [item[method] for item in document["paths"].values() for method in ("get", "post") if method in item]


def test_every_path_is_described_once() -> None:
    assert len(operations(DOCUMENT)) == len(ROUTES) + len(LOOKS)
    names = [each["operationId"] for each in operations(DOCUMENT)]
    assert len(set(names)) == len(names)


def test_nothing_is_referred_to_that_is_not_there() -> None:
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT)))
    assert "components/schemas/ErrorAnswer" in references
    for reference in references:
        found: Any = DOCUMENT
        for part in reference.split("/"):
            found = found[part]
    used = {name.rpartition("/")[2] for name in references if "schemas" in name}
    assert used == set(DOCUMENT["components"]["schemas"])


def test_objects_of_requests_take_no_other_fields() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    shapes = {shape.__name__ for route in ROUTES for shape in route.requests}
    assert len(shapes) > 5
    assert {name for name in shapes if schemas[name]["additionalProperties"] is not False} == set()


@pytest.mark.parametrize("needs_key", [True, False])
def test_keys_are_asked_for_where_there_are_some_but_not_of_probes(needs_key: bool) -> None:
    document = describe(ROUTES, "1.0", needs_key=needs_key)
    probes = {look.operation for look in LOOKS if not look.needs_key}
    for each in operations(document):
        asks = needs_key and each["operationId"] not in probes
        assert bool(each["security"]) == ("401" in each["responses"]) == asks


def test_every_error_of_a_request_is_described() -> None:
    posted = [each for each in operations(DOCUMENT) if "requestBody" in each]
    assert all(set(each["responses"]) == {"200", *map(str, ERRORS)} for each in posted)


def test_what_stands_in_paths_and_headers_is_described() -> None:
    paths = DOCUMENT["paths"]
    for path, item in paths.items():
        assert [each["name"] for each in item.get("parameters", [])] == re.findall(r"{(\w+)}", path)
    infer = paths["/v2/models/{name}/infer"]["post"]
    assert [each["name"] for each in infer["parameters"]] == ["inference-header-content-length"]
    assert "Retry-After" in DOCUMENT["components"]["responses"]["429"]["headers"]
    kserve = ("/v2/health/ready", "/v2/models/{name}", "/v2/models/{name}/ready")
    assert {look.path for look in LOOKS if "503" in paths[look.path]["get"]["responses"]} == {
        "/ready",
        "/info",
        *kserve,
    }

"""The OpenAPI document of a pool against the running app; see test_fuzz.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from orchestrator import AsyncModelPool
from orchestrator.http import create_app
from tests.http.test_fuzz import UNFIT
from tests.kit.http import serving
from tests.kit.pools import MODELS, catalogue_of, write_echo_server

ENDLESS = frozenset({"/api/events", f"{MODELS}/{{name}}/events", "/api/inference/events"})
KEPT = frozenset({"chat", "other"})


@pytest.fixture(scope="module")
def fuzzed(
    tiny_model: str, other_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A pool that is confined to one folder and queries no Hub."""
    server = write_echo_server(tmp_path_factory.mktemp("echo"))
    catalogue = catalogue_of({"chat": tiny_model, "other": other_model}, {"default": "chat"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pool = AsyncModelPool(
            catalogue,
            llama_server=server,
            state_dir=tmp_path_factory.mktemp("state"),
            models_dir=[Path(tiny_model).parent, Path(other_model).parent],
            kill_grace_s=0.2,
        )
        with serving(create_app(pool=pool)) as client:
            yield client
            answer = client.post(f"{MODELS}/chat/load", json={"force_reload": True})
            assert answer.status_code == 200, answer.text


def document() -> dict[str, Any]:
    catalogue = {"models": {"chat": {"model_path": "a.gguf"}}}
    return create_app(pool=AsyncModelPool(catalogue, llama_server="embedded")).openapi()


schema = schemathesis.openapi.from_dict(document())


@schema.exclude(path=sorted(ENDLESS)).parametrize()
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(case: schemathesis.Case[Any], fuzzed: httpx.Client) -> None:
    """A 500 is a bug, whatever was sent."""
    if isinstance(case.query, dict) and "follow" in case.query:
        case.query["follow"] = "false"  # a followed log never ends
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if "name" in case.path_parameters and is_valid and case.method != "DELETE":
        case.path_parameters["name"] = "chat"
    if case.path_parameters.get("name") in KEPT and case.method == "DELETE":
        return
    response = case.call(base_url=str(fuzzed.base_url))
    unfit = UNFIT | {"unsupported_method"} if case.path.startswith("/v1") else UNFIT
    excluded: Any = [check for check in CHECKS.get_all() if check.__name__ in unfit]
    case.validate_response(response, excluded_checks=excluded)
    assert response.status_code != 500, response.text

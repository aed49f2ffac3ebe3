"""The OpenAPI document against the running app, with requests generated from the document.

Valid and invalid requests load and unload a fake server. Every answer must be documented, with its
type and shape, and afterwards a model must load as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from orchestrator.http import create_app
from tests.kit.http import PREFIX, serving
from tests.kit.process.support import Fake

LOAD = PREFIX + "/load"
ENDLESS = frozenset({PREFIX + "/events"})
UNFIT = frozenset(
    {
        "not_a_server_error",  # 502, 503 and the like are documented; 500 is checked below
        "positive_data_acceptance",  # a path that fits the schema may have no model
    }
)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    server = Fake(tmp_path_factory.mktemp("fuzzed") / "fake")
    yield server
    assert not server.running()


@pytest.fixture(scope="module")
def fuzzed(
    fake: Fake, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """An app that is confined to one folder and queries no Hub."""
    folder = Path(tiny_model).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        app = create_app(
            llama_server=fake.path,
            server_env=fake.env,
            state_dir=tmp_path_factory.mktemp("state"),
            models_dir=folder,
        )
        with serving(app) as client:
            yield client
            answer = client.post(LOAD, json={"model_path": tiny_model, "force_reload": True})
            assert answer.status_code == 200, answer.text


schema = schemathesis.openapi.from_dict(create_app(llama_server="embedded").openapi())


@schema.exclude(path=sorted(ENDLESS)).parametrize()
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(
    case: schemathesis.Case[Any], fuzzed: httpx.Client, tiny_model: str
) -> None:
    """A 500 is a bug, whatever was sent."""
    if isinstance(case.query, dict) and "follow" in case.query:
        case.query["follow"] = "false"  # a followed log never ends
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    body = case.body if is_valid and isinstance(case.body, dict) else {}
    if "model_path" in body and len(str(body)) % 3:
        body["model_path"] = tiny_model  # so that some loads succeed
    response = case.call(base_url=str(fuzzed.base_url))
    unfit = UNFIT | {"unsupported_method"} if case.path.startswith("/v1") else UNFIT
    excluded: Any = [check for check in CHECKS.get_all() if check.__name__ in unfit]
    case.validate_response(response, excluded_checks=excluded)
    assert response.status_code != 500, response.text

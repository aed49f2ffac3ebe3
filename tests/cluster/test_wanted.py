"""The arguments of `build_app`, without Ray: what they mean, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.wanted import Catalogues, Models, Wanted, budget_of, slot_of
from orchestrator.errors import InvalidCatalogue, OrchestratorError
from orchestrator.ray_serve import build_app
from tests.kit.sentences import assert_sentence

TABLES = {"models": {"a": {"model_path": "a.gguf", "n_parallel": 2}, "b": {"model_path": "o/b"}}}
NODE = "9" * 56


def refusal(**args: Any) -> OrchestratorError:
    with pytest.raises(OrchestratorError) as caught:
        Wanted.of({"models": TABLES, **args})
    return caught.value


@pytest.mark.parametrize(
    ("args", "field", "key"),
    [
        ({"num_replica": 2}, "num_replica", "ray.unknown"),
        ({"num_replicas": 0}, "num_replicas", "ray.count"),
        ({"num_replicas": True}, "num_replicas", None),
        ({"num_replicas": "many"}, "num_replicas", None),
        ({"fronts": 1.5}, "fronts", None),
        ({"num_gpus": 1.5}, "num_gpus", "ray.gpus"),
        ({"num_gpus": -1}, "num_gpus", "ray.amount"),
        ({"num_cpus": "inf"}, "num_cpus", None),
        ({"held_s": float("nan")}, "held_s", None),
        ({"resources": ["gpu_node"]}, "resources", "ray.table"),
        ({"resources": {"gpu_node": "one"}}, "resources.gpu_node", None),
        ({"allowed_hosts": 5}, "allowed_hosts", "ray.hosts"),
        ({"allowed_hosts": ["http://x"]}, "allowed_hosts", None),
        ({"slot": "x" * 33}, "slot", None),
        ({"slot": 7}, "slot", "ray.slot"),
        ({"models": 5}, "models", "ray.models"),
        ({"catalogues": {"gpu": TABLES}}, "catalogues", "ray.labels"),
        ({"catalogues": [TABLES]}, "catalogues", None),
        ({"drain_timeout_s": -1}, "drain_timeout_s", None),
        ({"restart": "always"}, "restart", None),
        ({"memory": "much"}, "memory", None),
    ],
)
def test_a_mistake_names_its_argument(args: dict[str, Any], field: str, key: str | None) -> None:
    error = refusal(**args)
    assert error.problem.field == field
    if key is not None:
        assert_sentence(key, error.message)


def test_models_are_needed() -> None:
    with pytest.raises(OrchestratorError) as caught:
        Wanted.of({})
    assert caught.value.problem.field == "models"
    assert_sentence("ray.no_models", caught.value.message)


def test_a_mistake_in_any_catalogue_is_found(tmp_path: Path) -> None:
    """Before a replica is started; a file's has its line."""
    file = tmp_path / "models.toml"
    file.write_text('[models.a]\nmodel_path = "a"\nmodel_pth = "b"\n')
    assert "models.toml:3:" in refusal(models=str(file)).message
    assert isinstance(refusal(catalogues={"gpu=a": {"models": {"x": {}}}}), InvalidCatalogue)


def test_a_file_becomes_its_tables_and_its_folder(tmp_path: Path) -> None:
    """The config of a deployment has the catalogue itself: a changed file is a changed config."""
    file = tmp_path / "models.toml"
    file.write_text('[models.a]\nmodel_path = "a.gguf"\n')
    models = Models.of(str(file))
    assert models == Models({"models": {"a": {"model_path": "a.gguf"}}}, str(tmp_path))
    request = models.read().models["a"].request
    assert request is not None
    assert request.model_path == str(tmp_path / "a.gguf")


def test_a_command_line_passes_numbers_as_text() -> None:
    wanted = Wanted.of(
        {"models": TABLES, "num_replicas": "2", "num_gpus": "0.5", "warm": "false", "keep_s": "5"}
    )
    assert (wanted.num_replicas, wanted.num_gpus) == (2, 0.5)
    assert wanted.options == {"warm": False, "keep_s": 5, "drain_timeout_s": 60.0}


def test_what_a_stop_may_take_and_how_many_requests_there_are() -> None:
    wanted = Wanted.of(
        {"models": TABLES, "num_replicas": 2, "drain_timeout_s": 30, "kill_grace_s": 2}
    )
    assert wanted.drained_within_s == 30 + 2 + 5
    assert wanted.most_requests == 2 * (256 + 2 + 4), "waiting, and at the slots of both servers"


def test_a_user_config_means_the_same_again() -> None:
    given = Catalogues.of({"models": TABLES, "catalogues": {"gpu=a100, zone=b": TABLES}})
    assert Catalogues.of(json.loads(json.dumps(given.as_dict()))) == given


def test_the_labels_of_a_node_choose_its_catalogue() -> None:
    big: dict[str, Any] = {"models": {"big": {"model_path": "o/b"}}}
    small: dict[str, Any] = {"models": {}}
    given = Catalogues.of({"models": small, "catalogues": {"gpu=a100,zone=b": big}})
    assert given.on({"gpu": "a100", "zone": "b", "x": "y"}).tables == big
    assert given.on({"gpu": "a100"}).tables == small
    assert given.on({}).tables == small


def test_a_slot_is_named_after_its_node() -> None:
    assert slot_of("default", NODE) == f"default-{NODE}"
    assert len(slot_of("x" * 32, NODE)) == 64


@pytest.mark.parametrize(
    ("num_gpus", "memory", "pool", "budget"),
    [
        (0.5, "auto", {}, {"CUDA0": "8192 MiB"}),
        (0.25, "auto", {"memory": "auto"}, {"CUDA0": "4096 MiB"}),
        (1, "auto", {}, "auto"),
        (0, "auto", {}, "auto"),
        (0.5, "2 GiB", {}, "2 GiB"),
        (0.5, "auto", {"memory": "2 GiB"}, "auto"),
    ],
)
def test_a_part_of_a_gpu_is_that_part_of_its_memory(
    num_gpus: float, memory: str, pool: dict[str, Any], budget: Any
) -> None:
    models = Models({"pool": pool, **TABLES}, "/")
    assert budget_of(models, memory, {"Host": 32000, "CUDA0": 16384}, num_gpus) == budget


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        build_app({"models": TABLES})
    assert_sentence("ray.missing", str(caught.value))


def test_without_the_extra_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any extra there is no web framework either."""
    monkeypatch.delitem(sys.modules, "orchestrator.ray_serve", raising=False)
    monkeypatch.setitem(sys.modules, "orchestrator.cluster.app", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "orchestrator.cluster.app")
    with pytest.raises(ModuleNotFoundError, match=r"needs starlette.*llama-orchestrator\[ray\]"):
        importlib.import_module("orchestrator.ray_serve")

"""One cluster for all tests here; each leaves two replicas that listen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.pools import catalogue_of, write_echo_server
from tests.kit.ray_cluster import Cluster, cluster_of, write_wrapper


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="session")
def args(folder: Path) -> dict[str, Any]:
    """What is deployed: four models, of which two fit on each node, behind a wrapper script."""
    files = {name: str(folder / f"{name}.gguf") for name in "abcd"}
    for number, path in enumerate(files.values()):
        write_tiny_model(Path(path), seed=number)
    return {
        "models": catalogue_of(files, {"memory": "250 MiB"}),
        "num_replicas": 2,
        "llama_server": write_wrapper(folder, write_echo_server(folder)),
        "kill_grace_s": 1.0,
    }


@pytest.fixture(scope="session")
def cluster(folder: Path, args: dict[str, Any]) -> Iterator[Cluster]:
    with cluster_of(folder) as made:
        made.deploy(args)
        made.until_open(2)
        yield made
    assert made.servers == set(), "servers survived their cluster"

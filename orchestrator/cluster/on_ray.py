"""What is asked of Ray: that it is installed, and where a replica is. Its public API only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def serve() -> Any:
    """Return the module `ray.serve`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        from ray import serve as found
    except ModuleNotFoundError as error:
        raise without_extra(error) from error
    return found


def without_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that says how to install what is missing."""
    if (missing := error.name or "").startswith("orchestrator"):
        return error
    message = f'orchestrator.ray_serve needs {missing}: pip install "llama-orchestrator[ray]"'
    return ModuleNotFoundError(message, name=error.name)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica is.

    Attributes:
        address: Of its node, for the other nodes.
    """

    replica: str
    node: str
    address: str
    labels: Mapping[str, str]


def place() -> Place:
    """Return where this replica is."""
    import ray
    from ray.util import get_node_ip_address

    context = ray.get_runtime_context()
    return Place(
        replica=str(serve().get_replica_context().replica_tag),
        node=str(context.get_node_id()),
        address=str(get_node_ip_address()),
        labels={str(name): str(value) for name, value in context.get_node_labels().items()},
    )

"""The Serve application: a deployment of pools, one for each node, and one of fronts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.routing import Router

from orchestrator.cluster import on_ray
from orchestrator.cluster.front import Front
from orchestrator.cluster.replica import PoolReplica
from orchestrator.cluster.replicas import Replicas, asked_by
from orchestrator.cluster.wanted import Wanted
from orchestrator.http.guards import guard, limits, origins

POOL: Final = "Pool"
FRONT: Final = "Front"
_HEALTH_S: Final = 1.0  # a killed replica is replaced after 2 to 4 s, with Ray's 10 s after 8 to 9


class Replica(PoolReplica):
    """What Serve starts on each node."""

    async def __del__(self) -> None:  # Serve awaits it, once
        await self.stop()


class Ingress:
    """A replica that routes; Serve gives it the requests."""

    def __init__(self, pools: Any, held_s: float, allowed_hosts: tuple[str, ...]) -> None:
        self._replicas = Replicas(asked_by(pools))
        self._held_s = held_s
        self._hosts = origins.checked_hosts(allowed_hosts)

    def __serve_build_asgi_app__(self) -> Any:  # the name that `serve.ingress()` documents
        app: Any = Router(default=Front(self._replicas, self._held_s), lifespan=self._lifespan)
        app = limits.limit_body(app)
        checks = [origins.refuse_foreign(self._hosts)]
        return limits.linger(guard(app, checks, ("/api/", "/models", "/metrics", "/readyz")))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self._replicas.polled():
            yield


def build_app(args: Mapping[str, Any]) -> Any:
    """Return the Serve application; for `serve run` and the config files of Serve.

    Args:
        args: `models` (the file of a catalogue, or its tables), and any of `catalogues`,
            `num_replicas`, `resources`, `num_cpus`, `num_gpus`, `fronts`, `held_s`, `claim_s`,
            `allowed_hosts`, `slot`, `state_dir`, `llama_server` and the other options of a pool;
            see docs/ray.md.

    Raises:
        ModuleNotFoundError: Ray Serve is not installed.
        InvalidCatalogue: a catalogue has a mistake; the message says where.
        InvalidRequest: an argument cannot be used; `field` names it.
    """
    serve = on_ray.serve()
    wanted = Wanted.of(args)
    started = {
        "slot": wanted.slot,
        "options": dict(wanted.options),
        "claim_s": wanted.claim_s,
        "num_gpus": wanted.num_gpus,
    }
    common = {
        "graceful_shutdown_timeout_s": wanted.drained_within_s,
        "health_check_period_s": _HEALTH_S,
        "max_ongoing_requests": wanted.most_requests,
        "logging_config": {"enable_access_log": False},  # a line for each poll
    }
    pools = serve.deployment(
        Replica,
        name=POOL,
        num_replicas=wanted.num_replicas,
        max_replicas_per_node=1,
        user_config=wanted.catalogues.as_dict(),
        ray_actor_options={
            "num_cpus": wanted.num_cpus,
            "num_gpus": wanted.num_gpus,
            "resources": dict(wanted.resources),
        },
        **common,
    )
    fronts = serve.deployment(
        serve.ingress()(Ingress),
        name=FRONT,
        num_replicas=wanted.fronts,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return fronts.bind(pools.bind(**started), wanted.held_s, wanted.allowed_hosts)

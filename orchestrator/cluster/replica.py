"""A replica: the pool of one node, behind a listener that only fronts can use.

One task makes the pool, claims its slots, serves it and takes new catalogues, in that order; nobody
else changes anything. Ray's calls only put a catalogue into its queue, or read. The constructor
returns at once, because Serve holds a deployment back until it does.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from orchestrator.base import workers
from orchestrator.base.log import event_log
from orchestrator.cluster.door import Door
from orchestrator.cluster.on_ray import Place, place
from orchestrator.cluster.routing import ModelReport, ReplicaReport
from orchestrator.cluster.wanted import Catalogues, Models, budget_of, slot_of
from orchestrator.errors import OrchestratorError, Problem, SlotOwned, problem_of
from orchestrator.http import create_app
from orchestrator.http.pool.listing import value_of
from orchestrator.http.server import listener, server_of, url_of
from orchestrator.machine.states import State
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.pool.status import ModelStatus
from orchestrator.runtime.orchestrator import AsyncOrchestrator

_CLAIM_EVERY_S: Final = 0.2
_log = event_log("orchestrator.cluster")


class PoolReplica:
    """A pool and its listener.

    Args:
        options: Of the pool.
        claim_s: How long to wait for the slot, which a dead replica may still hold.
        num_gpus: See `budget_of`.
        where: Returns where this replica is.
    """

    def __init__(
        self,
        slot: str,
        options: Mapping[str, Any],
        claim_s: float,
        num_gpus: float,
        where: Callable[[], Place] = place,
    ) -> None:
        self._place: Place = where()
        self._slot = slot_of(slot, self._place.node)
        self._options = options
        self._claim_s = claim_s
        self._num_gpus = num_gpus
        self._key = secrets.token_urlsafe(32)
        self._wanted: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self._pool: AsyncModelPool | None = None
        self._url: str | None = None
        self._problem: Problem | None = None
        self._life: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------- what Serve calls

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on with this catalogue. It neither waits nor raises: either would stop all others."""
        self._wanted.put_nowait(user_config)
        if self._life is None:
            self._life = asyncio.ensure_future(self._live())

    async def check_health(self) -> None:
        """Raise if this replica serves nothing any more; while it loads or waits it is well."""
        if self._life is not None and self._life.done():
            self._life.result()
            raise RuntimeError("this replica has ended")
        if self._pool is not None and self._pool.has_ended and self._url is not None:
            raise RuntimeError("the pool of this replica has ended")

    async def report(self) -> ReplicaReport:
        """Return what fronts choose by."""
        where, pool = self._place, self._pool
        problem = None if self._problem is None else self._problem.as_dict()
        if pool is None or self._url is None or pool.has_ended:
            return ReplicaReport(where.replica, where.node, problem=problem)
        status = pool.status()
        entries = pool.catalogue.models.values()
        default = pool.catalogue.default
        return ReplicaReport(
            replica=where.replica,
            node=where.node,
            url=self._url,
            key=self._key,
            is_ready=pool.is_ready,
            free={one.device: one.total_mib - one.reserved_mib for one in status.budget},
            models=tuple(_report(pool, model) for model in status.models),
            names={
                name: entry.name
                for entry in entries
                for own in (entry.name, *entry.aliases)
                for name in (own, *(f"{own}:{preset.name}" for preset in entry.presets))
            },
            default=None if default is None else default.name,
            problem=problem,
        )

    async def stop(self) -> None:
        """Finish the answers that have begun, and end every server."""
        if self._life is None:
            return
        if self._url is None:
            self._life.cancel()
        self._wanted.put_nowait(None)
        await asyncio.wait({self._life})

    # ----------------------------------------------------------------------------- its one task

    async def _live(self) -> None:
        first = await self._wanted.get()
        assert first is not None  # noqa: S101 (of the call that has begun this)
        models = Catalogues.of(first).on(self._place.labels)
        memory = await self._budget(models)
        options = {**self._options, "slot": self._slot, "memory": memory}
        pool = self._pool = AsyncModelPool(models.tables, folder=models.folder, **options)
        try:
            await self._claim(pool)
            await self._serve(pool)
        finally:
            await pool.close()

    async def _budget(self, models: Models) -> Any:
        memory = self._options.get("memory", "auto")
        if not 0 < self._num_gpus < 1:
            return memory
        probe = AsyncOrchestrator(
            slot=self._slot, **{n: v for n, v in self._options.items() if n != "memory"}
        )
        found = await workers.waited(probe.devices)
        totals = {device.name: device.total_mib for device in found}
        return budget_of(models, memory, totals, self._num_gpus)

    async def _claim(self, pool: AsyncModelPool) -> None:
        """Start the pool, and wait for a slot that is still held."""
        ends = time.monotonic() + self._claim_s
        while True:
            try:
                await pool.start()
            except SlotOwned as error:
                self._problem = error.problem
                if time.monotonic() > ends:
                    raise
                await asyncio.sleep(_CLAIM_EVERY_S)
            else:
                self._problem = None
                return

    async def _serve(self, pool: AsyncModelPool) -> None:
        """Serve until there is no next catalogue."""
        app = create_app(pool=pool, allowed_hosts=(self._place.address,), end_on_signals=False)
        door = Door(app, self._key)
        http = server_of(door)
        with listener(self._place.address, 0) as listening:
            serving = asyncio.ensure_future(http.serve(sockets=[listening]))
            try:
                self._url = url_of(listening)
                while (wanted := await self._next(serving)) is not None:
                    await self._take(pool, wanted)
                self._url = None  # no front chooses it from now on
                await door.shut(self._options["drain_timeout_s"])
                await pool.close()
            finally:
                self._url = None
                http.should_exit = True
                await asyncio.wait({serving})

    async def _next(self, serving: asyncio.Task[None]) -> Mapping[str, Any] | None:
        """Return the next catalogue; None if there is none, because this is to end."""
        waiting = asyncio.ensure_future(self._wanted.get())
        try:
            await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise RuntimeError("the listener of this replica has ended")
            return waiting.result()
        finally:
            waiting.cancel()

    async def _take(self, pool: AsyncModelPool, wanted: Mapping[str, Any]) -> None:
        """Go on with another catalogue; one with a mistake changes nothing, and is reported."""
        try:
            models = Catalogues.of(wanted).on(self._place.labels)
            changes = await pool.reload(models.tables, folder=models.folder)
        except OrchestratorError as error:
            self._problem = problem_of(error)
            _log("error", "catalogue.refused", error=error.message)
        else:
            self._problem = None
            _log("info", "catalogue.taken", **changes.as_dict())


def _report(pool: AsyncModelPool, model: ModelStatus) -> ModelReport:
    used_at = model.last_used_at
    return ModelReport(
        name=model.name,
        value=value_of(pool, model),
        requests=model.leases + model.waiting,
        mib={} if model.memory is None else model.memory.devices,
        unused_s=0.0 if used_at is None else max(0.0, time.time() - used_at),
        pinned=model.pinned,
        is_ours=model.state is not State.HEALTHY or model.pid is not None,
    )

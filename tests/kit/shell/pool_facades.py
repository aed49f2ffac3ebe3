"""Stages of a pool whose clients call its facades: as threads, or as tasks of one event loop."""

from __future__ import annotations

import asyncio
from asyncio import events as running
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from orchestrator.pool.context import Turn
from orchestrator.pool.pool import AsyncModelPool, ModelPool
from tests.kit.machine.invariants import Violation
from tests.kit.shell.facade_stage import Puppet, SteppedLoop, named, position
from tests.kit.shell.pool_scene import Action, PoolScene
from tests.kit.shell.pool_stage import PoolStage
from tests.kit.shell.stage import BrokenError, Choose, Move

# -------------------------------------------------------------------------------------- threads


class ThreadPoolStage(PoolStage):
    """Clients are threads; one that goes away is interrupted where it waits."""

    facade = ModelPool

    def __init__(self, scene: PoolScene, choose: Choose) -> None:
        self.threads: dict[int, Puppet] = {}
        super().__init__(scene, choose)

    def _who(self) -> int | None:
        me = self._puppet()
        return next((i for i, puppet in self.threads.items() if puppet is me), None)

    def _can_withdraw(self, index: int) -> bool:
        return index in self.threads

    def _interrupt(self, index: int) -> None:
        puppet = self.threads[index]
        if not puppet.has_ended:
            self.ended.add(index)
            puppet.go(KeyboardInterrupt())

    def _release(self, index: int) -> None:
        self.given_back.add(index)

    def _call(self, action: Action) -> None:
        puppet = self.threads[action.index] = Puppet(partial(self._calling, action))
        self.puppets.append((action.text, puppet))
        puppet.go()

    def _calling(self, action: Action) -> object:
        pool, name = self.pool, action.model
        match action.verb:
            case "load" | "reload":
                return pool.load(name, force_reload=action.verb == "reload")
            case "unload" | "cut":
                return pool.unload(name, cut=action.verb == "cut")
            case "cancel":
                return pool.cancel(name)
            case "remove":
                return pool.remove(name)
            case "add":
                return pool.add(name, model_path=f"/{name}", memory={"D0": "1 MiB"})
        turn = Turn() if action.verb == "request" else None
        with pool.lease(name, turn=turn) as server:
            self.holding[action.index] = name
            try:
                is_over = partial(self.given_back.__contains__, action.index)
                self.threads[action.index].pause("the end of its lease", is_over)
            finally:
                del self.holding[action.index]
        return server

    def result_of(self, index: int) -> tuple[bool, object]:
        puppet = self.threads[index]
        return puppet.has_ended, puppet.result


# ----------------------------------------------------------------------------------- event loop


class LoopPoolStage(PoolStage):
    """Clients are tasks of one loop."""

    facade = AsyncModelPool

    def __init__(self, scene: PoolScene, choose: Choose) -> None:
        self.loop = SteppedLoop()
        self.tasks: dict[int, asyncio.Task[object]] = {}
        self.released: dict[int, asyncio.Event] = {}
        super().__init__(scene, choose)

    def _who(self) -> int | None:
        if running._get_running_loop() is None:
            return None
        task = asyncio.current_task(self.loop)
        return next((i for i, known in self.tasks.items() if known is task), None)

    def _at_once(self) -> Iterator[Move]:
        yield from super()._at_once()
        if ready := self.loop.ready:
            yield Move("loop", f"runs {self._label(ready[0])}", self.loop.step)

    def _label(self, handle: asyncio.Handle) -> str:
        return named(handle, self.tasks, lambda index: self.scene.actions[index].text)

    def _run_clients(self) -> None:
        while self.loop.ready:
            self.loop.step()

    def _can_withdraw(self, index: int) -> bool:
        return index in self.tasks

    def _interrupt(self, index: int) -> None:
        if self.tasks[index].cancel():
            self.ended.add(index)

    def _release(self, index: int) -> None:
        self.given_back.add(index)
        self.released[index].set()

    def _call(self, action: Action) -> None:
        self.tasks[action.index] = self.loop.create_task(self._calling(action))

    async def _calling(self, action: Action) -> object:
        pool, name = self.pool, action.model
        match action.verb:
            case "load" | "reload":
                return await pool.load(name, force_reload=action.verb == "reload")
            case "unload" | "cut":
                return await pool.unload(name, cut=action.verb == "cut")
            case "cancel":
                return await pool.cancel(name)
            case "remove":
                return await pool.remove(name)
        self.released[action.index] = asyncio.Event()
        turn = Turn() if action.verb == "request" else None
        async with pool.lease(name, turn=turn) as server:
            self.holding[action.index] = name
            try:
                await self.released[action.index].wait()
            finally:
                del self.holding[action.index]
        return server

    def result_of(self, index: int) -> tuple[bool, object]:
        task = self.tasks[index]
        if not task.done():
            return False, None
        if task.cancelled():
            return True, asyncio.CancelledError()
        return True, task.exception() or task.result()

    def key(self) -> tuple[object, ...]:
        return (
            *super().key(),
            tuple((i, *position(task)) for i, task in self.tasks.items()),
            tuple(self._label(handle) for handle in self.loop.ready),
        )

    def check_rest(self) -> None:
        if self.loop.failures:
            what = str(self.loop.failures[0])
            raise BrokenError(Violation("promise_the_loop_reports_no_error", what))
        super().check_rest()

    def close(self) -> None:
        """Drop all tasks, without asyncio's warnings about tasks that are still pending."""
        for task in self.tasks.values():
            cast("Any", task)._log_destroy_pending = False
            if task.done() and not task.cancelled():
                task.exception()
            task.get_coro().close()
        self.loop.close()
        super().close()

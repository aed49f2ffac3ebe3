"""A replica without Ray: what Serve calls, and when it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import Orchestrator, SlotOwned
from orchestrator.cluster.on_ray import Place
from orchestrator.cluster.replica import PoolReplica
from orchestrator.cluster.routing import ReplicaReport
from orchestrator.cluster.wanted import slot_of
from tests.kit.pools import catalogue_of, write_echo_server
from tests.kit.shell.harness import asyncio_test

PLACE = Place("r1", "ab" * 28, "127.0.0.1", {"room": "two"})
SLOT = slot_of("default", PLACE.node)


@pytest.fixture
def wanted(tiny_model: str) -> dict[str, Any]:
    """What Serve gives to `reconfigure`."""
    return {"models": catalogue_of({"m": tiny_model})}


@pytest.fixture
def options(tmp_path: Path, state_dir: Path) -> dict[str, Any]:
    server = write_echo_server(tmp_path)
    return {"llama_server": server, "state_dir": state_dir, "drain_timeout_s": 30.0}


@asynccontextmanager
async def living(
    wanted: dict[str, Any], options: dict[str, Any], claim_s: float = 30.0
) -> AsyncIterator[PoolReplica]:
    replica = PoolReplica("default", options, claim_s, 0.0, lambda: PLACE)
    assert (await replica.report()).url is None
    await replica.check_health()
    await replica.reconfigure(wanted)
    try:
        yield replica
    finally:
        await replica.stop()


async def until(replica: PoolReplica, holds: Callable[[ReplicaReport], object]) -> ReplicaReport:
    async with asyncio.timeout(30):
        while True:
            report = await replica.report()
            if holds(report):
                return report
            await asyncio.sleep(0.005)


async def until_ill(replica: PoolReplica) -> None:
    """Ask for its health until that is an error."""
    async with asyncio.timeout(30):
        while True:
            await replica.check_health()
            await asyncio.sleep(0.005)


def ask(report: ReplicaReport, model: str = "m", **more: Any) -> httpx.Response:
    headers = {"Proxy-Authorization": f"Bearer {report.key}"}
    return httpx.post(
        f"{report.url}/v1/completions",
        json={"model": model, **more},
        headers=headers,
        timeout=30,
        trust_env=False,
    )


@asyncio_test
async def test_it_reports_what_it_has_and_answers_fronts(
    wanted: dict[str, Any], options: dict[str, Any]
) -> None:
    async with living(wanted, options) as replica:
        report = await until(replica, lambda one: one.url)
        assert (report.replica, report.node, report.free) == ("r1", PLACE.node, {"Host": 1024})
        assert (report.names, report.default) == ({"m": "m"}, "m")
        answer = await asyncio.to_thread(ask, report)
        assert answer.json()["alias"] == "m"
        report = await until(replica, lambda one: one.models[0].value == "loaded")
        assert report.free == {"Host": 924}
        assert report.models[0].mib == {"Host": 100}
        await replica.check_health()
    assert (await replica.report()).url is None


@asyncio_test
async def test_it_waits_for_the_slot_of_its_predecessor(
    wanted: dict[str, Any], options: dict[str, Any]
) -> None:
    """And is well meanwhile: Serve must not replace it for that."""
    before = Orchestrator(slot=SLOT, state_dir=options["state_dir"])
    await asyncio.to_thread(before.start)
    async with living(wanted, options) as replica:
        report = await until(replica, lambda one: one.problem)
        assert report.problem is not None
        assert (report.problem["category"], report.url) == ("slot_owned", None)
        await replica.check_health()
        await asyncio.to_thread(before.close)
        report = await until(replica, lambda one: one.url)
        assert report.problem is None


@asyncio_test
async def test_it_does_not_wait_for_ever(wanted: dict[str, Any], options: dict[str, Any]) -> None:
    before = Orchestrator(slot=SLOT, state_dir=options["state_dir"])
    await asyncio.to_thread(before.start)
    async with living(wanted, options, claim_s=0.0) as replica:
        with pytest.raises(SlotOwned):
            await until_ill(replica)
    await asyncio.to_thread(before.close)


@asyncio_test
async def test_a_catalogue_with_a_mistake_changes_nothing_and_is_reported(
    wanted: dict[str, Any], options: dict[str, Any], tiny_model: str
) -> None:
    async with living(wanted, options) as replica:
        await until(replica, lambda one: one.url)
        await replica.reconfigure({"models": {"models": {"m": {"model_pth": "x"}}}})
        report = await until(replica, lambda one: one.problem)
        assert report.problem is not None
        assert report.problem["category"] == "invalid_catalogue"
        assert (await asyncio.to_thread(ask, report)).status_code == 200
        more = catalogue_of({"m": tiny_model, "n": tiny_model})
        await replica.reconfigure({"models": wanted["models"], "catalogues": {"room=two": more}})
        await until(replica, lambda one: "n" in one.names and one.problem is None)


@asyncio_test
async def test_it_finishes_its_answers_before_it_ends(
    wanted: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    async with living(wanted, options) as replica:
        report = await until(replica, lambda one: one.url)
        answer = asyncio.ensure_future(asyncio.to_thread(ask, report, until=str(go)))
        await until(replica, lambda one: one.models[0].requests == 1)
        ending = asyncio.ensure_future(replica.stop())
        await until(replica, lambda one: one.url is None)
        assert not ending.done()
        assert (await asyncio.to_thread(ask, report)).status_code == 503
        go.touch()
        assert (await answer).status_code == 200
        await ending


@asyncio_test
async def test_it_is_not_well_where_it_cannot_begin(
    options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Serve shows why, and tries again."""
    async with living(wanted, {**options, "llama_server": "/nowhere"}) as replica:
        with pytest.raises(Exception, match="/nowhere"):
            await until_ill(replica)

"""The cost of the orchestrator as callers, readers, leases, models and history grow.

`python -m tests.bench.scale_bench` prints a table; `--json FILE` writes the figures, and
`--plots DIR` draws them as SVG with matplotlib, which only this needs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.machine.facts import LeaseRequested
from orchestrator.runtime.owner import Owner
from tests.bench.bench import Figures, milliseconds, orchestrator

SIZES = (1, 10, 100, 1000)
Series = dict[int, float]


async def join_storm(server: str, model: str, callers: int) -> tuple[float, int]:
    """Return the milliseconds until this many identical loads are answered, and the spawns."""
    with tempfile.TemporaryDirectory() as state:
        async with AsyncOrchestrator(llama_server=server, state_dir=state) as orch:
            await orch.load(model, max_seq_length=256)
            await orch.unload()
            started = time.perf_counter()
            loads = (orch.load(model, max_seq_length=512) for _ in range(callers))
            outcomes = await asyncio.gather(*loads)
            took = (time.perf_counter() - started) * 1000
            return took, len({outcome.pid for outcome in outcomes})


def fan_out(server: str, model: str, readers: int) -> float:
    """Return the milliseconds from the end of a load until every reader has its last event."""
    with orchestrator(server) as orch:
        orch.start()
        seen = threading.Barrier(readers + 1)

        def read() -> None:
            for event in orch.events(after=0):
                if event.data["dest"] == "Healthy":
                    break
            seen.wait()

        threads = [threading.Thread(target=read) for _ in range(readers)]
        for thread in threads:
            thread.start()
        orch.load(model, max_seq_length=512)
        started = time.perf_counter()
        seen.wait()
        took = (time.perf_counter() - started) * 1000
        for thread in threads:
            thread.join()
        return took


def owner_of(orch: Orchestrator) -> Owner:
    owner = orch._owner
    assert owner is not None
    return owner


def lease_us(orch: Orchestrator, rounds: int = 300) -> float:
    """Return the median microseconds to take and return one lease."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        with orch.lease():
            took.append((time.perf_counter() - started) * 1e6)
    return statistics.median(took)


def with_leases_held(server: str, model: str, held: int) -> float:
    with orchestrator(server) as orch:
        orch.load(model, max_seq_length=512)
        owner = owner_of(orch)
        for _ in range(held):
            call = owner.call()
            owner.ask(call, LeaseRequested(call.ticket, owner.clock()))
            call.settled.result()
        return lease_us(orch)


def facts_per_second(server: str, model: str) -> float:
    """Return how many requests for a lease the owner handles per second."""
    with orchestrator(server) as orch:
        orch.load(model, max_seq_length=512)
        owner, rounds = owner_of(orch), 5000
        calls = [owner.call() for _ in range(rounds)]
        started = time.perf_counter()
        for call in calls:
            owner.post(LeaseRequested(call.ticket, owner.clock()))
        calls[-1].settled.result()
        return rounds / (time.perf_counter() - started)


def with_models(server: str, folder: Path, count: int) -> float:
    """Return the median milliseconds of `already_loaded` for a folder with this many models."""
    inside = folder / f"of-{count}"
    inside.mkdir()
    whole = write_tiny_model(inside / "model-Q4_K_M.gguf")
    for number in range(count - 1):
        os.link(whole, inside / f"other-{number:04d}-Q8_0.gguf")
    with orchestrator(server) as orch:
        orch.load(str(inside), max_seq_length=512)
        again = [
            milliseconds(lambda: orch.load(str(inside), max_seq_length=512)) for _ in range(100)
        ]
        return statistics.median(again)


def with_history(server: str, models: list[str], loads: int) -> tuple[float, float]:
    """Return the microseconds of `status()` after this many loads, and the growth in MiB."""
    me = psutil.Process()
    with orchestrator(server) as orch:
        orch.load(models[0], max_seq_length=512)
        before = me.memory_info().rss
        for number in range(loads):
            orch.load(models[number % 2], max_seq_length=512 + number % 7)
        grown = (me.memory_info().rss - before) / 2**20
        rounds = 2000
        spent = milliseconds(lambda: [orch.status() for _ in range(rounds)])
        return spent * 1000 / rounds, grown


def under_load(server: str, model: str, figures: Figures) -> None:
    """Measure CPU and memory while 16 threads take leases in a loop for three seconds."""
    with orchestrator(server) as orch:
        orch.load(model, max_seq_length=512)
        me, ended, count = psutil.Process(), threading.Event(), [0] * 16

        def use(number: int) -> None:
            while not ended.is_set():
                with orch.lease():
                    count[number] += 1

        threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
        cpu, started = sum(me.cpu_times()[:2]), time.perf_counter()
        for thread in threads:
            thread.start()
        ended.wait(3.0)
        ended.set()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - started
        figures.add("leases from 16 threads", sum(count) / took, "per s")
        figures.add("CPU meanwhile", (sum(me.cpu_times()[:2]) - cpu) / took * 100, "%")
        figures.add("resident memory meanwhile", me.memory_info().rss / 2**20, "MiB")


STYLE = """<style>
svg { color: #1f2328; --first: #0969da; --second: #bc4c00; --third: #1a7f37; --fourth: #8250df; }
@media (prefers-color-scheme: dark) {
  svg { color: #e6edf3; --first: #4493f8; --second: #f0883e; --third: #3fb950; --fourth: #a371f7; }
}
</style>"""
COLOURS = {
    "fill: #ffffff": "fill: none",
    "#000000": "currentColor",
    "#b0b0b0; stroke-opacity: 0.3": "currentColor; stroke-opacity: 0.15",
    "#1f77b4": "var(--first)",
    "#ff7f0e": "var(--second)",
    "#2ca02c": "var(--third)",
    "#d62728": "var(--fourth)",
}


def for_light_and_dark(svg: str) -> str:
    """Return one of matplotlib's pictures with the colours of the reader's light or dark."""
    for theirs, ours in COLOURS.items():
        svg = svg.replace(theirs, ours)
    head, defs, body = svg.partition(" <defs>\n")
    body = body.replace('<g id="text_', '<g fill="currentColor" id="text_')
    return head + STYLE + "\n" + defs + body


def draw(
    folder: Path, name: str, title: str, of_what: str, unit: str, series: dict[str, Series]
) -> None:
    """Draw one plot; the same figures give the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    mpl.rcParams["svg.hashsalt"] = name
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for label, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", label=label)
    axes.set(title=title, ylabel=unit, xscale="log", xlabel=of_what)
    axes.xaxis.set_major_formatter("{x:g}")
    values = [value for points in series.values() for value in points.values()]
    if max(values) > 10 * min(values):  # proportional growth is a straight line
        axes.set(yscale="log")
        few_decades = max(values) < 100 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set(ylim=(0, 1.2 * max(values)))
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    path.write_text(for_light_and_dark(path.read_text()))


def measured(figures: Figures, name: str, unit: str, of: Callable[[int], float]) -> Series:
    """Measure one figure at every size."""
    series = {}
    for size in SIZES:
        series[size] = of(size)
        figures.add(name.format(size), series[size], unit)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path)
    chosen = parser.parse_args()
    server, figures = os.environ["LLAMA_SERVER_PATH"], Figures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [str(write_tiny_model(folder / f"{n}.gguf", seed=n)) for n in range(2)]

        def storm(callers: int) -> float:
            took, pids = asyncio.run(join_storm(server, models[0], callers))
            assert pids == 1, f"{pids} servers for {callers} identical loads"
            return took

        joins = measured(figures, "{} identical loads at once, all answered", "ms", storm)
        readers = measured(
            figures, "events to {} readers", "ms", lambda n: fan_out(server, models[0], n)
        )
        leases = measured(
            figures,
            "lease while {} are held",
            "us",
            lambda n: with_leases_held(server, models[0], n),
        )
        listed = measured(
            figures,
            "already_loaded by a folder of {}",
            "ms",
            lambda n: with_models(server, folder, n),
        )
        past: Series = {}
        for loads in (1, 10, 100, 400):
            past[loads], grown = with_history(server, models, loads)
            figures.add(f"status() after {loads} loads", past[loads], "us")
        figures.add("memory grown by those 400 loads", grown, "MiB")
        figures.add("facts the owner takes", facts_per_second(server, models[0]), "per s")
        under_load(server, models[0], figures)
    if chosen.plots:
        draw(
            chosen.plots,
            "bench-callers",
            "Until all are answered, or have the event",
            "callers at once, or readers",
            "ms",
            {"identical loads": joins, "one event": readers},
        )
        draw(chosen.plots, "bench-leases", "One lease", "leases held meanwhile", "µs", {"": leases})
        draw(
            chosen.plots,
            "bench-models",
            "already_loaded",
            "models in the folder",
            "ms",
            {"": listed},
        )
        draw(chosen.plots, "bench-history", "status()", "loads before", "µs", {"": past})
    figures.write(chosen.json)


if __name__ == "__main__":
    main()

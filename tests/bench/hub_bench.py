"""The cost of a download through the orchestrator compared with `hf_hub_download`, in the same run.

`python -m tests.bench.hub_bench` serves a model of 1 GiB from a fake Hub in another process, and
fetches it with `hf_hub_download` and with `prefetch`, which hashes it, in turns. Then it cancels a
download of 200 MB a hundred times at random moments, and completes it at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from orchestrator import Cancelled, Orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from tests.bench.bench import Figures

_SERVE = """
import sys, threading
from pathlib import Path
from tests.kit.fake_hub import Hub, Repo
with Hub() as hub:
    for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
        hub.add(Repo(name, {"model-Q8_0.gguf": Path(path)}))
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""
_CLIENT = """
import sys
from huggingface_hub import hf_hub_download
hf_hub_download("org/Big", "model-Q8_0.gguf")
"""
ROUNDS, CANCELS = 3, 100


def seconds(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def throughput(folder: Path, size: int, figures: Figures) -> None:
    theirs: list[float] = []
    ours: list[float] = []
    waits: list[float] = []
    grown: list[int] = []
    me = psutil.Process()
    for turn in range(ROUNDS):
        for kind, took in (("client", theirs), ("ours", ours)):
            home = folder / f"hf-{kind}-{turn}"
            os.environ["HF_HOME"] = str(home)
            if kind == "client":
                command = [sys.executable, "-c", _CLIENT]
                took.append(seconds(partial(subprocess.run, command, check=True)))
            else:
                with orchestrator(folder / f"state-{turn}") as orch:
                    orch.status()
                    before, done = me.memory_info().rss, threading.Event()
                    watch = threading.Thread(target=_watch, args=(orch, done, waits))
                    watch.start()
                    took.append(seconds(partial(orch.prefetch, "org/Big")))
                    done.set()
                    watch.join()
                    grown.append(me.memory_info().rss - before)
            shutil.rmtree(home)
    mib = size / 2**20
    rates = [mib / statistics.median(figures) for figures in (theirs, ours)]
    figures.add("hf_hub_download", rates[0], "MiB/s")
    figures.add("prefetch, hashed", rates[1], "MiB/s")
    figures.add("prefetch / hf_hub_download", rates[1] / rates[0], "x", ">= 1.3")
    figures.add("host memory grows by", max(grown) / 2**20, "MiB", "< 20")
    figures.add("status() meanwhile, worst", max(waits) * 1000, "ms")


def _watch(orch: Orchestrator, done: threading.Event, waits: list[float]) -> None:
    while not done.wait(0.01):
        waits.append(seconds(orch.status))


def cancels(folder: Path, file: Path, figures: Figures) -> None:
    """Every cancel settles, and the partial download is resumed to the very same bytes."""
    os.environ["HF_HOME"] = str(folder / "hf-cancels")
    chance = random.Random(1)
    took: list[float] = []
    with orchestrator(folder / "state-cancels") as orch:
        for number in range(CANCELS):
            ended = threading.Event()

            def load(name: str = f"n{number}", ended: threading.Event = ended) -> None:
                try:
                    orch.load("org/Middle", load_request_id=name)
                except Cancelled:
                    pass
                finally:
                    ended.set()

            threading.Thread(target=load).start()
            time.sleep(chance.uniform(0, 0.35))
            started = time.perf_counter()
            orch.cancel(f"n{number}")
            ended.wait()
            took.append(time.perf_counter() - started)
        outcome = orch.prefetch("org/Middle")
    same = _sha256(Path(outcome.files[0])) == _sha256(file)
    took.sort()
    assert same, "the completed file differs from the source"
    figures.add(f"cancel, median of {CANCELS}", took[CANCELS // 2] * 1000, "ms")
    figures.add("cancel, p99", took[-2] * 1000, "ms", "< 1000")
    figures.add("cancel, worst", took[-1] * 1000, "ms", "< 1000")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def orchestrator(state_dir: Path) -> Orchestrator:
    return Orchestrator(llama_server=os.environ["LLAMA_SERVER_PATH"], state_dir=state_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    chosen, figures = parser.parse_args(), Figures()
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        big = write_tiny_model(folder / "big.gguf", padding_bytes=1 << 30)
        middle = write_tiny_model(folder / "middle.gguf", padding_bytes=200 << 20)
        command = [sys.executable, "-c", _SERVE, "org/Big", str(big), "org/Middle", str(middle)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as hub:
            assert hub.stdout is not None
            os.environ["HF_ENDPOINT"] = hub.stdout.readline().strip()
            throughput(folder, big.stat().st_size, figures)
            cancels(folder, middle, figures)
            hub.communicate("")
    figures.write(chosen.json)


if __name__ == "__main__":
    main()

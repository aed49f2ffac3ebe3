"""What open panels cost the service at rest: the CPU time of its process with none, and with 20.

Prints a table; `--json FILE` writes the figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

from playwright.sync_api import sync_playwright

from orchestrator.demo.tiny_model import write_tiny_model
from tests.bench.bench import Figures
from tests.bench.passthrough_bench import Service

PANELS: Final = 20
SETTLES_S: Final = 15.0
MEASURED_S: Final = 60.0


def percent_at_rest(pid: int) -> float:
    """Return the share of a core that a process uses, by the scheduler's own clock."""
    time.sleep(SETTLES_S)
    before = ran_s(pid)
    time.sleep(MEASURED_S)
    return (ran_s(pid) - before) / MEASURED_S * 100


def ran_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task")
    nanoseconds = (int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())
    return sum(nanoseconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        tiny = str(write_tiny_model(Path(name) / "tiny.gguf"))
        service = Service(os.environ["LLAMA_SERVER_PATH"], tiny, name)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        try:
            alone = percent_at_rest(service.process.pid)
            pages = [browser.new_context().new_page() for _ in range(PANELS)]
            for page in pages:
                page.goto(service.url)
                page.get_by_text("Healthy").first.wait_for()
            watched = percent_at_rest(service.process.pid)
        finally:
            browser.close()
            service.close()
    figures.add("CPU of the service at rest", alone, "%")
    figures.add(f"CPU of the service at rest, {PANELS} panels open", watched, "%")
    figures.add(f"what {PANELS} open panels cost", watched - alone, "%", "<= 2")
    figures.write(chosen.json)


if __name__ == "__main__":
    main()

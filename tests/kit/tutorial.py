"""Follow docs/tutorial.md: every command as written, on a port and in folders of this run's own.

`python -m tests.kit.tutorial` (`make tutorial`) does so in a fresh environment, prints how long the
commands take, and then installs as the README says. The Hub is a fake one, whose model is tiny.
It is no test of the suite: llama-server's threads spin, so beside other tests it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.copies import ROOT
from tests.kit.fake_hub import Hub, Repo
from tests.kit.process.support import until

PAGE: Final = (ROOT / "docs" / "tutorial.md").read_text()
REPO: Final = "unsloth/Qwen3-0.6B-GGUF"
_DEADLINE_S: Final = 600.0


class Reader:
    """A person with the page, a clone in `folder`, and as many terminals as they need.

    Args:
        folder: The clone; what the page makes is made here.
        hub: The address of the Hub.
        programs: The folder that activating the environment puts in front of PATH.
    """

    def __init__(self, folder: Path, hub: str, programs: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
            self.port, unused = one.getsockname()[1], other.getsockname()[1]
        theirs = ("LLAMA_", "PYTHON", "HF_", "UVICORN_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        self.env = clean | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub,
            "HF_HOME": str(folder / "hf"),
            "LLAMA_ORCHESTRATOR_PORT": str(unused),  # of `doctor`
            "LLAMA_ORCHESTRATOR_STATE_DIR": str(folder / "state"),
            "UVICORN_PORT": str(self.port),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }

    def run(self, block: str) -> str:
        """Type a block into a terminal, and return what it prints."""
        process = self.start(block)
        printed, _ = process.communicate(timeout=_DEADLINE_S)
        assert process.returncode == 0, f"{block}\n{printed}"
        return printed

    def start(self, block: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euc", block.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if "curl" in block else subprocess.STDOUT,  # curl's own progress
            text=True,
            start_new_session=True,
        )

    def status(self) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/api/inference/status"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def wait_for(self, **expected: object) -> None:
        """Wait until the status is there and has these members."""

        def is_there() -> bool:
            with suppress(OSError):
                return expected.items() <= self.status().items()
            return False

        until(is_there, f"a status with {expected}", 60)

    @contextmanager
    def serving(self, block: str) -> Iterator[None]:
        """Leave a block running in its terminal, and press Ctrl-C there at the end."""
        process = self.start(block)
        try:
            self.wait_for(state="Idle")
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            printed, _ = process.communicate(timeout=30)
        assert "Application shutdown complete" in printed, printed


def follow(folder: Path, programs: Path) -> dict[str, float]:
    """Do what the page says, and return the seconds that each part took.

    Args:
        folder: A clone of the repository.
        programs: Where the programs of the environment will be.
    """
    install, model, serve, ask, change, long, unload, refused, left, *rest = re.findall(
        r"```sh\n(.*?)```", PAGE, re.DOTALL
    )
    real, ask_real, second, by_name = rest
    (backend,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    took: dict[str, float] = {}
    began = time.monotonic()

    def done(part: str) -> None:
        took[part] = time.monotonic() - began - sum(took.values())

    with ExitStack() as stack:
        hub = stack.enter_context(Hub())
        tiny = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tiny.gguf")
        hub.add(Repo(REPO, {"Qwen3-0.6B-Q4_K_M.gguf": write_tiny_model(tiny, seed=7)}))
        reader = Reader(folder, hub.endpoint, programs)
        assert "ready" in reader.run(install)
        done("install")
        reader.run(model)
        (folder / "fastapi_embed.py").write_text(backend)
        done("model")
        with reader.serving(serve):
            reader.run(ask)
            pid = reader.status()["loaded"]["pid"]
            reader.run(ask)
            assert reader.status()["loaded"]["pid"] == pid
            done("first answers")

            plan, load = re.findall(r'"reload_reasons":\[(.*?\})\]', reader.run(change))
            assert (
                plan == load == '{"field":"llama_extra_args","running":[],"requested":["-t","1"]}'
            )
            done("change")

            stream = reader.start(long)
            reader.wait_for(leases=1)
            assert '"unloaded"' in reader.run(unload)
            printed, _ = stream.communicate(timeout=10)
            assert (stream.returncode, len(printed)) == (0, 1500)
            assert reader.status()["state"] == "Idle"
            answer = reader.run(refused)
            assert '"field":"cache_type_kv"' in answer
            assert "q8_0" in answer
        assert "is free and empty" in reader.run(left)
        done("break")
        with reader.serving(real):
            assert len(reader.run(ask_real)) == 500
            assert reader.status()["loaded"]["model_path"].startswith(REPO)
        done("real model")
        reader.run(second)
        first, _, again = (line.split()[-1] for line in reader.run(by_name).splitlines())
        assert (first, again) == ("[]", "['second']")
        done("two models")
    return took


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="llama-orchestrator-tutorial-") as name:
        clone = Path(name, "clone")
        left_out = shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "*.egg-info", ".*_cache"
        )
        shutil.copytree(ROOT, clone, ignore=left_out)
        programs = clone / ".venv" / "bin"
        took = follow(clone, programs)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        for line in re.findall(r"^pip install.*", (ROOT / "README.md").read_text(), re.MULTILINE):
            run = ["bash", "-euc", line.replace("install", "install -q")]
            subprocess.run(run, cwd=clone, env={**os.environ, "PATH": path}, check=True)
    for part, seconds in took.items():
        print(f"{part:<15}{seconds:6.1f} s")
    print(f"{'all commands':<15}{sum(took.values()):6.1f} s")


if __name__ == "__main__":
    main()

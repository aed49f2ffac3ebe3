"""`pull`, as a process of its own, against the fake hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.demo import tiny_model
from tests.kit.fake_hub import Hub, Repo
from tests.kit.process.support import until

NAME = "org/Tiny-GGUF"
DEADLINE_S = 60
Pull = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Repo:
    big = tiny_model.write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    small = tiny_model.write_tiny_model(tmp_path / "small.gguf", seed=1)
    return hub.add(Repo(NAME, {"tiny-Q8_0.gguf": big, "tiny-Q4_K_M.gguf": small}))


@pytest.fixture
def pull(tmp_path: Path) -> Iterator[Pull]:
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "orchestrator.cli", "pull", *args]
        process = subprocess.Popen(
            [*command, "--state-dir", str(tmp_path / "state")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def test_pulled_model_is_cached(pull: Pull, repo: Repo, hub: Hub) -> None:
    code, out, err = ended(pull(f"{NAME}:Q4_K_M"))
    assert code == 0, err
    assert out.splitlines()[0].split() == ["✓", f"{NAME}:Q4_K_M", "Q4_K_M"]
    path = Path(out.splitlines()[1].strip())
    assert path.is_file()
    assert "tiny-Q4_K_M.gguf" in err, "no bar for the file"
    hub.clear()
    code, out, _ = ended(pull(NAME, "--gguf-variant", "q4_k_m", "--revision", repo.commit))
    assert (code, Path(out.splitlines()[1].strip())) == (0, path)
    assert not hub.requests, "a cached commit needs no request"


def test_interrupted_pull_is_continued_by_the_next(
    pull: Pull, repo: Repo, hub: Hub, hf_home: Path
) -> None:
    stall = hub.fail(stall_after=3 << 20, path="/cdn/", times=1)
    process = pull(f"{NAME}:Q8_0")
    hub.wait_for(lambda: stall.held)
    blobs = hf_home / "hub" / "models--org--Tiny-GGUF" / "blobs"
    until(lambda: any(p.stat().st_size for p in blobs.glob("*.incomplete")), "bytes on disk")
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130
    assert "the next pull resumes" in err
    assert "Traceback" not in err
    hub.clear()
    code, _, err = ended(pull(f"{NAME}:Q8_0"))
    assert code == 0, err
    (again,) = hub.seen("/cdn/", "GET")
    assert again.range is not None


def test_json_output_is_one_object_a_line(pull: Pull, repo: Repo) -> None:
    code, out, _ = ended(pull(NAME, "--json"))
    assert code == 0
    *progress, outcome = map(json.loads, out.splitlines())
    assert outcome["gguf_variant"] == "Q4_K_M"
    assert outcome["revision"] == repo.commit
    last: dict[str, Any] = progress[-1]
    assert last["bytes_done"] == last["bytes_total"] == outcome["size_bytes"]


def test_failed_pull_lists_the_variants_and_exits_with_1(pull: Pull, repo: Repo) -> None:
    code, out, err = ended(pull(f"{NAME}:Q2_K"))
    assert (code, out) == (1, "")
    assert "Q4_K_M" in err
    assert "Q8_0" in err
    code, out, _ = ended(pull("org/none", "--json"))
    assert (code, json.loads(out.splitlines()[-1])["category"]) == (1, "model_not_found")


@pytest.mark.parametrize("model", ["model.gguf", "/tmp/x", "a/b/c", ""])
def test_model_that_is_not_a_repo_is_a_usage_error(pull: Pull, model: str) -> None:
    code, out, err = ended(pull(model))
    assert (code, out) == (2, "")
    assert "owner/name" in err or "MODEL" in err

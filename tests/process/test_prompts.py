"""Prompts survive a swap, and cost nobody anything where they do not."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import Cancelled, Orchestrator, State
from orchestrator.base.tokens import Generation
from orchestrator.http import create_app
from orchestrator.server.prompts import PromptStore
from tests.kit.http import serving
from tests.kit.process.support import Background, Fake, Make, until_state

TEXT = "The lighthouse keeper wrote in his log about ships. " * 4  # bytes are tokens
Keep = Callable[..., Orchestrator]


@pytest.fixture
def keep(llama_server: str, state_dir: Path) -> Iterator[Keep]:
    """Start orchestrators that keep prompts, over the real server."""
    made: list[Orchestrator] = []

    def start(**options: Any) -> Orchestrator:
        given: dict[str, Any] = {"keep_prompts": True, "llama_server": llama_server}
        orch = Orchestrator(state_dir=state_dir, **(given | options)).start()
        made.append(orch)
        return orch

    yield start
    for orch in made:
        orch.close()


def cached(orch: Orchestrator, text: str = TEXT) -> int:
    """Return how many tokens of a prompt the server did not compute."""
    with orch.lease() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        asked = {"prompt": text, "n_predict": 1}
        with httpx.Client(base_url=server.base_url, headers=headers, trust_env=False) as client:
            return int(client.post("/completion", json=asked).json()["timings"]["cache_n"])


def files(state_dir: Path) -> list[Path]:
    return sorted((state_dir / "default" / "prompts").glob("*"))


@pytest.mark.external
def test_a_prompt_is_not_computed_anew_after_another_model(
    keep: Keep, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    orch = keep()
    orch.load(tiny_model)
    assert cached(orch) == 0
    orch.load(other_model)
    orch.load(tiny_model)
    assert cached(orch) >= len(TEXT) - 8
    prompts = orch.status().prompts
    assert prompts is not None
    assert prompts.tokens_restored >= len(TEXT)
    (kept,) = files(state_dir)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


@pytest.mark.external
def test_a_prompt_is_there_for_the_next_owner_and_gone_where_none_is_to_be_kept(
    keep: Keep, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    orch = keep()
    orch.load(tiny_model)
    cached(orch)
    orch.load(other_model)
    orch.close()
    orch = keep()
    orch.load(tiny_model)
    assert cached(orch) >= len(TEXT) - 8
    orch.close()
    orch = keep(keep_prompts=False)
    orch.load(tiny_model)
    assert (cached(orch), files(state_dir), orch.status().prompts) == (0, [], None)


@pytest.mark.external
@pytest.mark.parametrize("how", ["unload", "idle", "other settings"])
def test_only_a_load_of_the_same_target_gets_it_and_only_a_load_saves_it(
    keep: Keep, state_dir: Path, tiny_model: str, how: str
) -> None:
    orch = keep()
    orch.load(tiny_model, idle_ttl_s=0.2 if how == "idle" else None)
    cached(orch)
    if how == "unload":
        orch.unload()
    elif how == "idle":
        until_state(orch, State.IDLE)
    orch.load(tiny_model, max_seq_length=512)
    assert cached(orch) == 0
    assert bool(files(state_dir)) is (how == "other settings")


@pytest.mark.external
def test_a_cancel_does_not_wait_for_a_save(keep: Keep, tiny_model: str, other_model: str) -> None:
    """A server that is stopped answers nothing, and is killed as ever."""
    orch = keep(kill_grace_s=0.0)
    pid = orch.load(tiny_model).pid
    os.kill(pid, signal.SIGSTOP)
    loading = Background(orch.load, other_model)
    until_state(orch, State.KILLING)
    begun = time.monotonic()
    assert orch.cancel(generation=2)
    assert time.monotonic() - begun < 1.0  # of the two seconds that a save may take
    assert isinstance(loading.error(), Cancelled)


@pytest.mark.external
def test_a_save_that_takes_too_long_is_given_up(
    keep: Keep, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    orch = keep(kill_grace_s=0.0)
    os.kill(orch.load(tiny_model).pid, signal.SIGSTOP)
    assert orch.load(other_model).status == "loaded"
    assert files(state_dir) == []


def test_a_server_that_cannot_save_is_started_as_ever(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    """The fake server's help says nothing of its flags."""
    orch = make(keep_prompts=True)
    orch.load(model_a)
    assert orch.load(model_b).status == "loaded"
    assert "--slot-save-path" not in orch.plan(model_a).argv


@pytest.mark.external
def test_the_first_answer_through_the_service_says_what_was_gained(
    llama_server: str, state_dir: Path, tiny_model: str, other_model: str
) -> None:
    app = create_app(llama_server=llama_server, state_dir=state_dir, keep_prompts=True)
    asked = {"prompt": TEXT, "n_predict": 1, "max_tokens": 1}
    with serving(app) as client:

        def load(path: str) -> None:
            loaded = client.post("/api/inference/load", json={"model_path": path})
            assert loaded.status_code == 200, loaded.text

        load(tiny_model)
        assert client.post("/v1/completions", json=asked).status_code == 200
        load(other_model)
        load(tiny_model)
        for _ in range(2):  # only the first one counts
            assert client.post("/v1/completions", json=asked).status_code == 200
        prompts = client.get("/api/inference/status").json()["prompts"]
        assert prompts["tokens_restored"] >= prompts["tokens_reused"] >= len(TEXT) - 8
        scraped = client.get("/metrics").text
        assert f"prompt_tokens_reused_total {prompts['tokens_reused']}.0" in scraped


# ------------------------------------------------------------------------------------- the files


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts", most_bytes=250)
    for number in range(4):
        file = store.folder / f"key{number}-0.bin"
        file.write_bytes(b"x" * 100)
        os.utime(file, (number, number))
    store._stay_within_bounds()
    assert [file.name for file in sorted(store.folder.iterdir())] == ["key2-0.bin", "key3-0.bin"]


def test_only_so_many_targets_are_kept(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts", most_bytes=1 << 20)
    for number in range(20):
        for slot in range(2):
            file = store.folder / f"key{number}-{slot}.bin"
            file.write_bytes(b"x")
            os.utime(file, (number, number))
    store._stay_within_bounds()
    assert {file.name.partition("-")[0] for file in store.folder.iterdir()} == {
        f"key{number}" for number in range(4, 20)
    }


def test_what_an_unfinished_save_has_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir(mode=0o755)
    (folder / "key-0.part").write_bytes(b"half")
    store = PromptStore(folder, most_bytes=1)
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_prompts_that_are_of_no_use_three_times_are_given_up(tmp_path: Path) -> None:
    """A server may restore them, and compute everything anew."""
    store = PromptStore(tmp_path / "prompts", most_bytes=1 << 20)
    file = store.folder / "key-0.bin"
    file.write_bytes(b"x")
    for number, useful in enumerate((0, 0, 7, 0, 0, 0), 1):
        generation = Generation(number)
        store._unjudged = generation, "key"
        assert store.judge_of(Generation(99)) is None
        judge = store.judge_of(generation)
        assert judge is not None
        assert file.exists()
        judge(useful)
        judge(5)  # the second answer says nothing
    assert not file.exists()
    assert store.counts.reused == 7

"""Loads that wait for the Hub are loads of the machine: in the order of calls, and nobody's loss.

What runs goes on running until the Hub has said yes, and with `prefetch` until the files are there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import LoadRequest, Orchestrator, State
from orchestrator.demo import tiny_model
from orchestrator.errors import Cancelled, HubError, ModelNotFound, OrchestratorError, Superseded
from tests.kit.fake_hub import Blob, Content, Hub, Repo
from tests.kit.process.support import Background, until

pytestmark = pytest.mark.external

NAME = "org/Tiny-GGUF"
OTHER = "org/Other-GGUF"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    top = tmp_path_factory.mktemp("models")
    return {
        "tiny-Q4_K_M.gguf": tiny_model.write_tiny_model(top / "a.gguf", seed=1),
        "tiny-Q8_0.gguf": tiny_model.write_tiny_model(top / "b.gguf", seed=2),
    }


@pytest.fixture
def repo(hub: Hub, models: dict[str, Content]) -> Repo:
    return hub.add(Repo(NAME, models))


@pytest.fixture
def orch(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


def running_pid(orch: Orchestrator) -> int:
    """Return the pid of what is Healthy."""
    status = orch.status()
    assert status.state is State.HEALTHY
    assert status.loaded is not None
    return status.loaded.pid


def test_a_load_with_prefetch_has_its_generation_at_once_and_shows_as_loading(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    """`submit` and `prefetch` go together; the state stays, the phase is `downloading`."""
    pid = orch.load(NAME).pid
    hold = hub.fail(hang=True, path="/cdn/")
    generation = orch.submit(NAME, gguf_variant="Q8_0", prefetch=True)
    hub.wait_for(lambda: hold.held)
    status = orch.status()
    assert status.loading is not None
    assert (status.loading.generation, status.loading.phase) == (generation, "downloading")
    assert (status.loading.gguf_variant, status.prefetching) == ("Q8_0", ())
    assert running_pid(orch) == pid
    assert orch.progress().phase == "downloading"
    assert orch.outcome(generation) is None
    hold.remove()
    until(lambda: orch.outcome(generation) is not None, "it is loaded")
    assert running_pid(orch) != pid


def test_a_cancel_that_overtakes_a_load_with_prefetch_wins_however_long_the_download(
    orch: Orchestrator, repo: Repo, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B68: it was compared with the time when the download had ended."""
    assert not orch.cancel("x")
    hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, NAME, prefetch=True, load_request_id="x")
    assert isinstance(load.error(), Cancelled)


def test_an_older_load_with_a_slow_look_up_never_ends_a_newer_one_that_prefetches(
    orch: Orchestrator, repo: Repo, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B69: the older load ended the newer one beside the machine, whatever their order."""
    path = tiny_model.write_tiny_model(tmp_path / "local.gguf", seed=5)
    looking, go_on = threading.Event(), threading.Event()
    look_up = orch._target

    def slow(request: LoadRequest) -> Any:
        if request.model_path == str(path):
            looking.set()
            assert go_on.wait(20)
        return look_up(request)

    monkeypatch.setattr(orch, "_target", slow)
    older = Background(orch.load, str(path))
    assert looking.wait(20)
    hold = hub.fail(hang=True, path="/cdn/")
    newer = Background(orch.load, NAME, prefetch=True)
    hub.wait_for(lambda: hold.held)
    go_on.set()
    assert isinstance(older.error(), Superseded)
    hold.remove()
    assert newer.result().model_path == NAME


@pytest.mark.parametrize("name", [f"{NAME}:Q8_0", NAME.upper(), NAME])
def test_an_unload_reaches_what_prefetches_by_every_name_it_has(
    orch: Orchestrator, repo: Repo, hub: Hub, name: str
) -> None:
    """B70: the facade and the machine each had their own idea of what a model is called."""
    pid = orch.load(NAME).pid
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, NAME, gguf_variant="Q8_0", prefetch=True)
    hub.wait_for(lambda: hold.held)
    assert orch.unload(name).status == "unloaded"
    assert isinstance(load.error(), Cancelled)
    if ":" in name:
        assert running_pid(orch) == pid, "the other variant is not what was named"
    else:
        assert orch.status().state is State.IDLE


def test_an_unload_of_a_variant_reaches_a_load_that_left_it_to_the_hub(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    load = Background(orch.load, NAME, prefetch=True)
    hub.wait_for(lambda: hold.held)
    assert orch.unload(f"{NAME}:Q4_K_M").status == "unloaded"
    assert isinstance(load.error(), Cancelled)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("fields", "category"),
    [
        ({"model_path": "org/none"}, "model_not_found"),
        ({"gguf_variant": "Q2_K"}, "model_not_found"),
        ({"revision": "nope"}, "model_not_found"),
        ({"model_path": "org/Gated"}, "hub_gated"),
    ],
)
def test_what_the_hub_refuses_costs_the_running_model_nothing(
    orch: Orchestrator,
    repo: Repo,
    hub: Hub,
    models: dict[str, Content],
    fields: dict[str, str],
    category: str,
    prefetch: bool,
) -> None:
    """B72: the Hub was asked after the running model had been killed."""
    hub.add(Repo("org/Gated", models, gated=True))
    pid = orch.load(NAME).pid
    wanted = LoadRequest.from_dict({"model_path": NAME, "prefetch": prefetch, **fields})
    for ask in (orch.plan, orch.load):
        with pytest.raises(OrchestratorError) as caught:
            ask(wanted)
        assert caught.value.problem.category == category, ask
    assert running_pid(orch) == pid
    assert orch.status().loading is None


def test_a_hub_that_cannot_be_reached_costs_the_running_model_nothing(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    pid = orch.load(NAME).pid
    hub.stop()
    for ask in (orch.load, orch.plan):
        with pytest.raises(HubError) as caught:
            ask(NAME, gguf_variant="Q8_0", stall_timeout_s=2)
        assert caught.value.problem.category == "hub_unreachable"
    assert running_pid(orch) == pid


def test_a_disk_that_is_too_small_costs_the_running_model_nothing(
    orch: Orchestrator, repo: Repo, hub: Hub, models: dict[str, Content]
) -> None:
    pid = orch.load(NAME).pid
    huge = Blob(1 << 49, lambda start, length: b"")
    huge.__dict__["sha256"] = "0" * 64  # nobody is to read it for that
    hub.add(Repo(OTHER, {"tiny-Q8_0.gguf": huge}))
    hub.clear()
    with pytest.raises(OrchestratorError) as caught:
        orch.load(OTHER, gguf_variant="Q8_0")
    assert caught.value.problem.category == "disk_full"
    assert running_pid(orch) == pid
    assert not hub.seen("/cdn/", "GET")


def test_a_model_that_is_asked_for_is_named_by_what_the_hub_says_while_another_runs(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    """The Hub is asked while the running model serves, and only then is it stopped."""
    pid = orch.load(NAME).pid
    hold = hub.fail(hang=True, path="/api/models")
    load = Background(orch.load, NAME, gguf_variant="Q8_0")
    hub.wait_for(lambda: hold.held)
    with orch.lease() as server:
        assert server.pid == pid
    loading = orch.status().loading
    assert loading is not None
    assert loading.phase == "downloading"
    hold.remove()
    assert load.result().gguf_variant == "Q8_0"


def test_a_newer_load_joins_the_one_that_waits_for_its_files(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    first = Background(orch.load, NAME, prefetch=True)
    hub.wait_for(lambda: hold.held)
    second = Background(orch.load, NAME)
    until(lambda: (s := orch.status().loading) and s.callers == 2, "it joins")
    hold.remove()
    assert first.result().generation == second.result().generation


def test_a_prefetch_call_is_cancelled_by_its_id_also_when_the_cancel_comes_first(
    orch: Orchestrator, repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    assert not orch.cancel("early")
    early = Background(orch.prefetch, NAME, load_request_id="early")
    assert isinstance(early.error(), Cancelled)
    late = Background(orch.prefetch, NAME, load_request_id="late")
    hub.wait_for(lambda: hold.held)
    assert orch.cancel("late")
    assert isinstance(late.error(), Cancelled)
    assert orch.status().prefetching == ()


def test_a_fifth_prefetch_is_busy(
    orch: Orchestrator, repo: Repo, hub: Hub, models: dict[str, Content]
) -> None:
    """Four at once, whoever asks; a call for the same model shares its download."""
    hold = hub.fail(hang=True, path="/cdn/")
    for number in range(4):
        hub.add(Repo(f"org/Number-{number}", models))
    calls = [Background(orch.prefetch, f"org/Number-{number}") for number in range(4)]
    until(lambda: len(orch.status().prefetching) == 4, "four are on their way")
    for ask in (orch.prefetch, orch.submit):
        with pytest.raises(OrchestratorError) as caught:
            ask(LoadRequest(model_path=NAME, prefetch=ask == orch.submit))
        assert caught.value.problem.category == "busy"
    shared = Background(orch.prefetch, "org/Number-1")
    hold.remove()
    for call in (*calls, shared):
        assert call.result().files


def test_a_missing_file_is_found_before_the_running_model_is_stopped(
    orch: Orchestrator, repo: Repo, tmp_path: Path
) -> None:
    pid = orch.load(NAME).pid
    with pytest.raises(ModelNotFound):
        orch.load(str(tmp_path / "none.gguf"))
    assert running_pid(orch) == pid

"""The examples of the documentation, on a tiny model and the embedded server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import orchestrator
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.copies import EXAMPLES, ROOT, shown_in
from tests.kit.process.support import until

DEADLINE_S = 120.0
Example = Callable[..., str]


def environment(state_dir: Path, **more: str) -> dict[str, str]:
    """Return a user's environment, with slots for this test alone and no variable for a server."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return clean | {
        "LLAMA_ORCHESTRATOR_STATE_DIR": str(state_dir),
        "PYTHONPATH": str(Path(orchestrator.__file__).parents[1]),
        "PYTHONWARNINGS": "error",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@pytest.fixture
def example(state_dir: Path) -> Example:
    """Run an example to its end, and return its output; no server may be left."""

    def run(name: str, *args: str, returncode: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *args],
            capture_output=True,
            text=True,
            env=environment(state_dir),
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def started(*command: str, state_dir: Path, says: str, **env: str) -> Iterator[str]:
    """Start a program that keeps running, and yield the address that it prints."""
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=EXAMPLES,
        env=environment(state_dir, **env),
    ) as process:
        assert process.stdout is not None
        printed = []
        try:
            for line in process.stdout:
                printed.append(line)
                if says in line and (found := re.search(r"http://[\d.]+:\d+", line)):
                    yield found[0]
                    break
            else:
                pytest.fail("it printed no address: " + "".join(printed))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def backend(state_dir: Path, tiny_model: str) -> Iterator[str]:
    """The FastAPI example, served by uvicorn."""
    command = ("uvicorn", "fastapi_embed:app", "--port", "0")
    yield from started(*command, state_dir=state_dir, says="running on", MODEL=tiny_model)


WSGI_APPS = ("flask_embed:app", "django_embed:application")


def gunicorn(app: str, state_dir: Path, model: str) -> Iterator[str]:
    """Serve an example of the synchronous frameworks, as its page says."""
    command = ("gunicorn", "--workers=1", "--threads=8", "--bind=127.0.0.1:0", app)
    yield from started(*command, state_dir=state_dir, says="Listening at", MODEL=model)


@pytest.fixture(params=WSGI_APPS)
def wsgi_backend(request: pytest.FixtureRequest, state_dir: Path, tiny_model: str) -> Iterator[str]:
    yield from gunicorn(request.param, state_dir, tiny_model)


@pytest.fixture
def serving(state_dir: Path) -> Iterator[str]:
    """`llama-orchestrator serve`."""
    command = ("orchestrator.cli", "serve", "--port", "0", "--json")
    yield from started(*command, state_dir=state_dir, says="url")


def test_fastapi_example_loads_once_and_answers(backend: str) -> None:
    with httpx.Client(base_url=backend, timeout=DEADLINE_S) as client:
        assert client.get("/api/inference/status").json()["state"] == "Idle"
        pids = set()
        for _ in range(2):
            answer = client.post("/ask", params={"question": "Why is the sky blue?"})
            assert answer.status_code == 200, answer.text
            assert len(answer.text) == 100
            status = client.get("/api/inference/status").json()
            assert status["state"] == "Healthy"
            pids.add(status["loaded"]["pid"])
        assert len(pids) == 1


@pytest.fixture
def slow_model(tmp_path: Path) -> str:
    """A model that takes seconds for 1,500 tokens."""
    return str(write_tiny_model(tmp_path / "slow.gguf", n_layer=80))


@pytest.fixture
def streaming(state_dir: Path, slow_model: str) -> Iterator[str]:
    """The example of a route that streams."""
    command = ("uvicorn", "streaming_route:app", "--port", "0")
    yield from started(*command, state_dir=state_dir, says="running on", MODEL=slow_model)


def test_streaming_route_holds_its_lease_as_long_as_the_stream(
    streaming: str, slow_model: str
) -> None:
    """Neither shorter, or a swap ends an answer; nor longer, or a client that left holds it up."""
    question = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 1500}
    api = streaming + "/api/inference"
    with httpx.Client(timeout=DEADLINE_S) as client, ThreadPoolExecutor() as threads:
        one_thread = {
            "model_path": slow_model,
            "llama_extra_args": ["-t", "1"],
        }  # waits for no other
        client.post(api + "/load", json=one_thread).raise_for_status()
        with client.stream("POST", streaming + "/chat", json=question) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            assert client.get(api + "/status").json()["leases"] == 1
        until(lambda: client.get(api + "/status").json()["leases"] == 0, "the end of the lease")

        with client.stream("POST", streaming + "/chat", json={**question, "max_tokens": 50}) as it:
            lines = it.iter_lines()
            next(lines)
            unloading = threads.submit(httpx.post, api + "/unload", timeout=DEADLINE_S)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert unloading.result().json()["status"] == "unloaded"


def test_streaming_route_answers_errors_with_their_status(streaming: str) -> None:
    """What the server refuses is not a stream of one error."""
    answer = httpx.post(streaming + "/chat", json={"messages": "none"}, timeout=DEADLINE_S)
    assert answer.status_code in (400, 500)
    assert "detail" in answer.json()


def test_tests_of_a_backend_pass_as_they_are_printed(state_dir: Path, tmp_path: Path) -> None:
    """With the backend of the tutorial and the fake server, copied beside them."""
    for name in ("test_backend.py", "fake_server.py", "fastapi_embed.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_backend.py"],
        cwd=tmp_path,
        env=environment(state_dir, PYTHONWARNINGS="default"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert "warning" not in done.stdout


def test_notebook_example_runs_as_a_script(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells one after the other."""
    monkeypatch.chdir(tmp_path)
    printed = example("notebook.py").splitlines()
    assert printed[0] == "loaded []"
    assert len(printed[1]) == 64
    assert len(printed) == 5


def test_prometheus_scrapes_the_route_that_the_service_has(serving: str) -> None:
    """Its files are read by no test here: the queries are in test_docs.py."""
    scrape = (EXAMPLES / "prometheus.yml").read_text()
    assert "metrics_path" not in scrape, "the default is /metrics"
    assert '"127.0.0.1:8642"' in scrape
    assert (EXAMPLES / "prometheus-rules.yml").name in scrape
    assert "llama_orchestrator_state{" in httpx.get(serving + "/metrics").text


def test_wsgi_example_loads_once_for_all_threads(wsgi_backend: str) -> None:
    with httpx.Client(base_url=wsgi_backend, timeout=DEADLINE_S) as client:
        assert client.get("/status").json()["state"] == "Idle"
        with ThreadPoolExecutor(8) as threads:
            answers = [
                threads.submit(client.post, "/ask", json={"question": f"{i}?"}) for i in range(16)
            ]
        for answer in answers:
            assert answer.result().json()["choices"][0]["message"]["content"] != ""
        status = client.get("/status").json()
        assert (status["state"], status["loaded"]["generation"]) == ("Healthy", 1)


def test_wsgi_example_answers_with_a_problem(state_dir: Path, tmp_path: Path) -> None:
    """By default, both frameworks answer an exception with a page of their own."""
    for app in WSGI_APPS:
        for url in gunicorn(app, state_dir, str(tmp_path / "missing.gguf")):
            answer = httpx.post(url + "/ask", json={"question": "?"}, timeout=DEADLINE_S)
            assert answer.status_code == 404
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["category"] == "model_not_found"


def test_sync_script_loads_asks_reloads_and_unloads(example: Example, tiny_model: str) -> None:
    printed = example("sync_script.py", tiny_model).splitlines()
    assert printed[0].startswith("loaded: pid ")
    assert printed[0].endswith("context 512")
    assert printed[-2:] == ["reloaded: max_seq_length was 512, is 1024", "unloaded"]


def test_openai_example_streams_an_answer(example: Example, tiny_model: str) -> None:
    """The tiny model prints 64 tokens of noise."""
    assert len(example("openai_client.py", tiny_model, "Why is the sky blue?").strip()) > 30


def test_progress_bar_ends_ready_or_with_the_error(
    example: Example, tiny_model: str, tmp_path: Path
) -> None:
    printed = example("progress_bar.py", tiny_model)
    assert f"ready        [{'#' * 40}]" in printed
    assert re.search(r"^ready after \d+\.\d s$", printed, re.MULTILINE)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(tiny_model).read_bytes()[:10_000])
    assert "invalid_model: " in example("progress_bar.py", str(broken), returncode=1)


def test_settings_panel_shows_what_apply_would_do(
    example: Example, serving: str, tiny_model: str
) -> None:
    """Load, none, reload with its reason, and a refused setting that changes nothing."""

    def apply(*settings: str, returncode: int = 0) -> list[str]:
        printed = example(
            "settings_panel.py", serving, tiny_model, *settings, returncode=returncode
        )
        return printed.splitlines()

    assert apply("max_seq_length=512") == ["Apply would load", "loaded: context 512"]
    assert apply("max_seq_length=512") == ["Apply would none", "already_loaded: context 512"]
    assert apply("max_seq_length=1024") == [
        "Apply would reload",
        "  max_seq_length: 512 -> 1024",
        "loaded: context 1024",
    ]
    (refused,) = apply("max_seq_length=1024", "cache_type_kv=q9", returncode=1)
    assert refused.startswith("cache_type_kv: ")
    assert apply("max_seq_length=1024")[0] == "Apply would none"


def test_client_of_a_service_loads_and_asks(
    example: Example, serving: str, tiny_model: str, tmp_path: Path
) -> None:
    """A refusal is the service's own, and changes nothing."""
    first, answer = example("connect.py", serving, tiny_model, "Why?").splitlines()
    assert (first, len(answer)) == ("loaded: generation 1", 100)
    missing = str(tmp_path / "missing.gguf")
    assert "model_not_found: " in example("connect.py", serving, missing, "Why?", returncode=1)
    assert example("connect.py", serving, tiny_model, "Why?").startswith("already_loaded: ")


def test_two_slots_hold_two_models_and_refuse_a_third_owner(
    example: Example, tiny_model: str, other_model: str
) -> None:
    printed = example("two_slots.py", tiny_model, other_model).splitlines()
    addresses = {line.rpartition(" at ")[2] for line in printed[:2]}
    assert len(addresses) == 2
    assert printed[2] == "answers: Idle, titles: Healthy"
    assert printed[3].startswith("slot 'titles' is owned by this process")


def test_two_models_take_turns_in_room_for_one(
    example: Example, tiny_model: str, other_model: str
) -> None:
    printed = example("two_models.py", tiny_model, other_model).splitlines()
    pids = {line.rpartition(" ")[2] for line in printed[:2]}
    assert len(pids) == 2
    assert printed[2] == "first: load, would evict ['second'], fits: True"
    assert [line.partition(":")[0] for line in printed[3:5]] == ["first", "second"]
    assert sorted(printed[5].split("'")[3::4]) == ["Healthy", "Idle"]


def test_crash_policy_restarts_the_server(example: Example, tiny_model: str) -> None:
    """By another process and generation; the example prints how the first one ended."""
    printed = example("crash_policy.py", tiny_model)
    assert "-> Healthy" in printed
    assert "the last server ended with -9" in printed
    found = re.findall(r"generation (\d+) (?:was|is) pid (\d+)", printed)
    (generation, pid), (next_generation, next_pid) = found
    assert int(next_generation) > int(generation)
    assert next_pid != pid


def test_every_example_is_tested_and_shown() -> None:
    """A page must show each file, and a test must run it."""
    tests = (Path(__file__), Path(__file__).with_name("test_deployment.py"))
    tested = "".join(path.read_text() for path in tests)
    shown = {name for page in ROOT.glob("docs/**/*.md") for name in shown_in(page.read_text())}
    examples = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert examples == shown
    assert {name for name in examples if Path(name).stem not in tested} == set()

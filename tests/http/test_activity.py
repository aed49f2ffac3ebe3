"""`/api/activity` and `/api/usage`: what they tell of requests, and what happens to the file."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import AsyncModelPool
from orchestrator.base import log
from orchestrator.errors import ShuttingDown
from orchestrator.http import create_app
from orchestrator.http.activity import activity as activities
from orchestrator.http.activity.activity import Activity, Asked
from orchestrator.http.activity.heard import NOTHING, Heard, Tokens
from orchestrator.http.activity.store import MOST, Served, Store
from orchestrator.http.activity.usage import STEP_S, Meter, Moment
from tests.kit.http import PREFIX, Serve, serving
from tests.kit.pools import catalogue_of, write_echo_server
from tests.kit.process.support import until
from tests.kit.shell.harness import asyncio_test

CHAT = "/v1/chat/completions"
SECRET = "the secret of the prompt"
Rows = list[dict[str, Any]]


def rows(client: httpx.Client, **asked: Any) -> Rows:
    answer = client.get("/api/activity", params=asked)
    assert answer.status_code == 200, answer.text
    found: Rows = answer.json()
    return found


def until_row(client: httpx.Client, count: int = 1) -> dict[str, Any]:
    """Wait for that many requests: one is noted a moment after its client has its answer."""
    found: Rows = []

    def look() -> bool:
        found[:] = rows(client)
        return len(found) >= count

    until(look, "the request in the activity")
    return found[0]


# ------------------------------------------------------------------------------------ real servers


@pytest.fixture
def real(serve: Serve, llama_server: str, tiny_model: str) -> Iterator[httpx.Client]:
    with serve(llama_server) as client:
        loaded = client.post(f"{PREFIX}/load", json={"model_path": tiny_model})
        assert loaded.status_code == 200
        yield client


def stream(client: httpx.Client, path: str, **body: Any) -> Rows:
    with client.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.status_code == 200
        return [
            json.loads(line[6:])
            for line in answer.iter_lines()
            if line.startswith("data: ") and line != "data: [DONE]"
        ]


@pytest.mark.external
def test_tokens_are_those_of_the_answer(real: httpx.Client) -> None:
    messages = [{"role": "user", "content": SECRET}]
    body = {"messages": messages, "max_tokens": 9}
    answer = real.post(CHAT, json=body).json()
    row = until_row(real)
    usage, timings = answer["usage"], answer["timings"]
    assert row == {
        "at": row["at"],
        "model": "tiny",
        "key": None,
        "path": CHAT,
        "status": 200,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": timings["cache_n"],
        "completion_tokens": usage["completion_tokens"],
        "tokens_per_s": pytest.approx(timings["predicted_per_second"], abs=0.01),
        "wait_s": row["wait_s"],
        "first_byte_s": row["first_byte_s"],
        "total_s": row["total_s"],
    }
    assert 0 <= row["wait_s"] <= row["first_byte_s"] <= row["total_s"]
    assert row["prompt_tokens"] > row["cached_tokens"] == 0

    events = stream(real, CHAT, **body)
    row, timings = until_row(real, 2), events[-1]["timings"]
    assert row["completion_tokens"] == timings["predicted_n"] == 9
    assert row["prompt_tokens"] == timings["prompt_n"] + timings["cache_n"]
    assert row["cached_tokens"] == timings["cache_n"] > 0

    events = stream(real, CHAT, **body, stream_options={"include_usage": True})
    row, usage = until_row(real, 3), events[-1]["usage"]
    assert row["prompt_tokens"] == usage["prompt_tokens"]
    assert row["completion_tokens"] == usage["completion_tokens"]


@pytest.mark.external
def test_tokens_are_told_by_other_apis_too(real: httpx.Client) -> None:
    """Responses and messages have names of their own for them."""
    answer = real.post("/v1/responses", json={"input": SECRET, "max_output_tokens": 5}).json()
    row = until_row(real)
    assert row["completion_tokens"] == answer["usage"]["output_tokens"] > 0
    assert row["prompt_tokens"] == answer["usage"]["input_tokens"] > 0

    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    usage = real.post("/v1/messages", json=body).json()["usage"]
    row = until_row(real, 2)
    assert row["completion_tokens"] == usage["output_tokens"] > 0
    assert row["prompt_tokens"] == usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)

    events = stream(real, "/v1/messages", **body)
    begun = next(one for one in events if one["type"] == "message_start")["message"]["usage"]
    row = until_row(real, 3)
    assert row["completion_tokens"] > 0
    cached = begun.get("cache_read_input_tokens", 0)
    assert row["prompt_tokens"] == begun["input_tokens"] + cached > 0


@pytest.mark.external
def test_tokens_of_embeddings_are_told(serve: Serve, llama_server: str, tiny_model: str) -> None:
    """There they come before the vectors, which are longer than what is kept."""
    with serve(llama_server) as client:
        body = {"model_path": tiny_model, "kind": "embedding", "pooling": "mean"}
        assert client.post(f"{PREFIX}/load", json=body).status_code == 200
        answer = client.post("/v1/embeddings", json={"input": ["one word"] * 50})
        assert len(answer.content) > 1 << 14
        assert until_row(client)["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"] > 0


@pytest.mark.external
def test_usage_adds_up_to_the_tokens(real: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 20}
    stream(real, CHAT, **body)
    real.post(CHAT, json=body)
    until_row(real, 2)
    used = real.get("/api/usage").json()
    points = used["points"]
    assert sum(one["requests"] for one in points) == 2
    completion = sum(one["tokens_per_s"] for one in points) * used["step_s"]
    assert completion == pytest.approx(sum(one["completion_tokens"] for one in rows(real)), abs=0.2)
    assert points[-1]["free_mib"] > 0
    prompt = sum(one["prompt_tokens_per_s"] for one in points) * used["step_s"]
    read = [one["prompt_tokens"] - one["cached_tokens"] for one in rows(real)]
    assert prompt == pytest.approx(sum(read), abs=0.2)


@pytest.mark.external
def test_file_is_private_and_has_no_prompt_and_no_answer(
    real: httpx.Client, state_dir: Path
) -> None:
    query = "?note=the+secret+of+the+query"
    answer = real.post(
        f"{CHAT}{query}",
        json={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 20},
    )
    until_row(real)
    said = answer.json()["choices"][0]["message"]["content"]
    files = sorted((state_dir / "default").glob("activity.db*"))
    assert files[0].name == "activity.db"
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        held = file.read_bytes()
        assert b"secret" not in held
        assert said.encode() not in held


# -------------------------------------------------------------------------------------- what counts


@pytest.fixture
def pool(
    tiny_model: str, other_model: str, tmp_path: Path, state_dir: Path
) -> Iterator[httpx.Client]:
    """A pool of two models on a server that answers what it was sent."""
    catalogue = catalogue_of({"chat": tiny_model, "other": other_model}, {"default": "chat"})
    catalogue["keys"] = {}
    for name, table in (("ann", {"models": ["chat"]}), ("eve", {}), ("root", {"admin": True})):
        (tmp_path / name).write_text(f"key-of-{name}")
        catalogue["keys"][name] = {"key_file": str(tmp_path / name), **table}
    server = write_echo_server(tmp_path)
    made = AsyncModelPool(catalogue, llama_server=server, state_dir=state_dir, kill_grace_s=0.2)
    with serving(create_app(pool=made)) as client:
        client.headers["X-Api-Key"] = "key-of-root"
        yield client


def as_(name: str) -> dict[str, str]:
    return {"X-Api-Key": f"key-of-{name}"}


def test_every_request_for_a_model_is_told_with_its_status(pool: httpx.Client) -> None:
    """Also those that reach none; questions for the models are no requests for one."""
    assert pool.post(CHAT, json={"model": "chat"}).status_code == 200
    assert pool.post(CHAT, json={"model": "gone"}).status_code == 404
    assert pool.post("/v1/embeddings", json={"model": "other"}).status_code == 400
    assert pool.get("/v1/models").status_code == 200
    assert pool.get("/v1/models/gone").status_code == 404
    until_row(pool, 3)
    told = [(one["model"], one["path"], one["status"]) for one in rows(pool)]
    assert told == [("other", "/v1/embeddings", 400), (None, CHAT, 404), ("chat", CHAT, 200)]
    assert {one["key"] for one in rows(pool)} == {"root"}
    assert [one["status"] for one in rows(pool, limit=2)] == [400, 404]
    assert [one["status"] for one in rows(pool, model="chat")] == [200]
    assert pool.get("/api/activity", params={"model": "gone"}).status_code == 404
    assert pool.get("/api/activity", params={"limit": 0}).status_code == 422
    [waited] = rows(pool, model="chat")
    assert waited["wait_s"] > 0  # for its load


def test_client_that_leaves_is_told(pool: httpx.Client, tmp_path: Path) -> None:
    body = {"model": "chat", "stream": 2, "until": str(tmp_path / "never")}
    with pool.stream("POST", CHAT, json=body) as answer:
        next(answer.iter_lines())
    row = until_row(pool)
    assert (row["status"], row["model"]) == (499, "chat")
    assert row["first_byte_s"] is not None
    assert row["completion_tokens"] is None


def test_key_sees_what_it_has_asked_itself(pool: httpx.Client) -> None:
    """An admin sees all."""
    for name, model in (("ann", "chat"), ("eve", "other"), ("eve", "gone"), ("root", "chat")):
        pool.post(CHAT, json={"model": model}, headers=as_(name))
    until_row(pool, 4)
    told: dict[str, Rows] = {}
    for name in ("ann", "eve", "root"):
        told[name] = pool.get("/api/activity", headers=as_(name)).json()
        points = pool.get("/api/usage", headers=as_(name)).json()["points"]
        assert sum(one["requests"] for one in points) == len(told[name])
    assert [(one["key"], one["model"]) for one in told["ann"]] == [("ann", "chat")]
    assert [(one["key"], one["model"]) for one in told["eve"]] == [("eve", None), ("eve", "other")]
    assert [one["key"] for one in told["root"]] == ["root", "eve", "eve", "ann"]
    hidden = pool.get("/api/activity", params={"model": "other"}, headers=as_("ann"))
    assert hidden.status_code == 404


def test_usage_has_the_memory_of_models_that_a_key_sees(pool: httpx.Client) -> None:
    pool.post(CHAT, json={"model": "other"})
    held = []
    for name in ("root", "ann"):
        held.append(pool.get("/api/usage", headers=as_(name)).json()["points"][-1]["memory_mib"])
    assert held == [100, 0]


def test_activity_outlives_the_service(
    serve: Serve, tiny_model: str, tmp_path: Path, state_dir: Path
) -> None:
    for number in (1, 2):
        with serve() as client:
            assert client.post(CHAT, json={}).status_code == 503
            until_row(client, number)
            assert [one["status"] for one in rows(client)] == [503] * number


# ---------------------------------------------------------------------------------------- the file


def served(number: int, **changed: Any) -> Served:
    values: dict[str, Any] = {
        "at": number,
        "model": "m",
        "key": None,
        "path": CHAT,
        "status": 200,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 20,
        "tokens_per_s": None,
        "wait_s": 0.0,
        "first_byte_s": 0.5,
        "total_s": 1.0,
    }
    return Served(**(values | changed))


def everything(_: Served) -> bool:
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "activity.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store(lambda: path, most=10)
    yield made
    made.close()


def numbers(store: Store, limit: int = 100) -> list[float]:
    return [one.at for one in store.read(everything, limit)]


def test_only_the_last_ones_are_kept(store: Store) -> None:
    store.write(served(n) for n in range(25))
    assert numbers(store) == list(range(24, 14, -1))
    assert numbers(store, 3) == [24, 23, 22]
    store.write([served(25)])
    assert numbers(store)[-1] == 16


def test_file_that_was_removed_is_made_anew(store: Store, path: Path) -> None:
    store.write([served(1)])
    path.unlink()
    store.write([served(2)])
    assert numbers(store) == [2]
    assert path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database" * 500),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + b"x" * 4096),
        lambda path: _change(path, "PRAGMA user_version = 99"),
        lambda path: _change(path, "PRAGMA user_version = 0"),
    ],
    ids=["garbage", "damaged", "newer", "of another program"],
)
def test_file_that_is_not_what_was_written_is_set_aside(
    path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = Store(lambda: path)
    first.write([served(1)])
    first.close()
    damage(path)
    second = Store(lambda: path)
    second.write([served(2)])
    assert numbers(second) == [2]
    assert path.with_suffix(".damaged").exists()
    second.close()
    log.flush()
    assert "activity.set_aside" in caplog.text


def _change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as file:
        file.execute(statement)
    file.close()


def test_full_disk_loses_nothing_that_has_room_in_memory(
    store: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and what has waited is written when there is room again."""
    caplog.set_level("INFO", "orchestrator")
    store.write([served(1)])
    assert store._file is not None
    store._file.execute("PRAGMA max_page_count = 1")
    long = "x" * 5000
    for number in (2, 3):
        store.write([served(number, path=long)])
    assert numbers(store) == [3, 2, 1]
    log.flush()
    assert caplog.text.count("activity.unwritten") == 1
    assert "activity.written_again" not in caplog.text
    store._file.execute("PRAGMA max_page_count = 1000000")
    store.write([served(4)])
    assert numbers(store) == [4, 3, 2, 1]
    store.close()
    log.flush()
    assert "activity.written_again" in caplog.text
    assert numbers(Store(lambda: path)) == [4, 3, 2, 1]


def test_what_waits_in_memory_has_a_bound(tmp_path: Path) -> None:
    store = Store(lambda: tmp_path / "no folder" / "activity.db")
    store.write(served(n) for n in range(MOST + 5))
    assert numbers(store, 2 * MOST) == list(range(MOST + 4, 4, -1))


def test_what_is_asked_before_there_is_a_folder_waits(path: Path) -> None:
    """An app without its lifespan claims its slot with the first load."""
    claimed: list[Path] = []

    def where() -> Path:
        if not claimed:
            raise ShuttingDown.because("this orchestrator has not started")
        return claimed[0]

    store = Store(where)
    store.write([served(1)])
    assert numbers(store) == [1]
    claimed.append(path)
    store.write([served(2)])
    assert numbers(store) == [2, 1]
    assert path.exists()
    store.close()


def test_link_in_the_place_of_the_file_is_not_followed(store: Store, path: Path) -> None:
    target = path.with_name("of another")
    target.write_bytes(b"")
    path.symlink_to(target)
    store.write([served(1)])
    assert target.read_bytes() == b""
    assert numbers(store) == [1]


@asyncio_test
async def test_thousands_of_requests_in_a_moment_are_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few transactions, on a thread of ours."""
    activity = Activity(lambda: tmp_path, dict)
    writes: list[int] = []
    write = activity._store.write

    def counted(rows: Any) -> None:
        writes.append(len(rows))
        write(rows)

    monkeypatch.setattr(activity._store, "write", counted)
    for _ in range(5000):
        asked = Asked(activity, CHAT, None)
        asked.end()
        await asyncio.sleep(0)
    assert len(await activity.recent(everything, MOST)) == 5000
    assert sum(writes) == 5000
    assert len(writes) < 500
    async with activity.lifespan():
        pass


@asyncio_test
async def test_disk_that_does_not_answer_ends_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activities, "_READ_S", 0.01)
    behind: list[Callable[[], object]] = []
    monkeypatch.setattr(activities._BEHIND, "put", behind.append)
    with pytest.raises(Exception, match="the disk does not answer"):
        await Activity(lambda: tmp_path, dict).recent(everything, 1)
    [read] = behind
    read()  # it comes too late, and nobody hears of it


# --------------------------------------------------------------------------------- what is heard


ANSWERS = {
    '{"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":7,"total_tokens":10,'
    '"prompt_tokens_details":{"cached_tokens":2}},"id":"x","timings":{"cache_n":2,"prompt_n":5,'
    '"predicted_n":3,"predicted_per_second":12.5}}': Tokens(7, 2, 3, 12.5),
    'data: {"timings":{"cache_n":4,"prompt_n":5,"predicted_n":3,"predicted_per_second":1.5}}'
    "\n\ndata: [DONE]\n\n": Tokens(9, 4, 3, 1.5),
    '{"object":"list","usage":{"prompt_tokens":6,"total_tokens":6},"data":['
    + "0.1," * 9000
    + "]}": Tokens(6, None, None, None),
    '{"usage":{"input_tokens":5,"cache_read_input_tokens":3,"output_tokens":2}}': Tokens(8, 3, 2),
    r'{"content":"she said \"usage\": {\"prompt_tokens\": 99}"}': NOTHING,
    "": NOTHING,
    '{"usage":null}': NOTHING,
    '{"usage":{"prompt_tokens":99999999999999999999}}': NOTHING,
}


@pytest.mark.parametrize(("answer", "tokens"), ANSWERS.items(), ids=range(len(ANSWERS)))
@given(data=st.data())
def test_tokens_are_heard_in_whatever_pieces_an_answer_comes(
    answer: str, tokens: Tokens, data: st.DataObject
) -> None:
    whole, heard = answer.encode(), Heard()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=9)))
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        heard.feed(whole[begin:end])
    assert heard.tokens() == tokens


def test_tokens_of_a_long_answer_are_in_the_steps_that_they_took() -> None:
    now = [1000.0]
    meter = Meter(lambda: now[0])
    meter.sample({"m": Moment(1, 0, 5)}, 100)
    now[0] += 4 * STEP_S
    meter.ended(served(1, completion_tokens=400, tokens_per_s=20.0), 0)
    rates = [point.tokens_per_s for point in meter.usage(lambda *_: True, bool, 5).points]
    assert sum(rates) * STEP_S == pytest.approx(400)
    assert len([rate for rate in rates if rate]) in (4, 5)


def test_steps_without_requests_are_there_and_old_ones_go() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    meter.tokens(("m", None), 5)
    now[0] = 10 * STEP_S
    points = meter.usage(lambda *_: True, bool, 60).points
    assert [point.at for point in points] == [n * STEP_S for n in range(11)]
    now[0] = 1e6
    points = meter.usage(lambda *_: True, bool, 60).points
    assert len(points) == 720
    assert all(point.tokens_per_s == 0 for point in points)

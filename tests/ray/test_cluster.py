"""Real Ray, real Serve, two logical nodes: what routes, survives, drains and leaves nothing."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.process import support
from tests.kit.ray_cluster import APP, Cluster, Stream, kill

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray has some of its own
]
MODELS = "abcd"
STREAM_S = 30.0
LIFE_S = 1.0
"""How long a server may survive its replica."""


def pid_of(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    pid: int = answer.json()["pid"]
    return pid


def answers(cluster: Cluster, model: str) -> bool:
    try:
        return cluster.ask(model).status_code == 200
    except httpx.TransportError:  # the proxy was on the node that is lost
        return False


def are_gone(pids: set[int]) -> bool:
    return not any(map(support.is_running, pids))


def is_stopped(cluster: Cluster, replica: str | None = None) -> bool:
    """Whether Serve has told a replica, or this one, to end."""
    stopping = cluster.replicas(state="STOPPING")
    return bool(stopping) if replica is None else replica in stopping


def leases(cluster: Cluster, model: str) -> int:
    count: int = cluster.client.get(f"/api/models/{model}").json()["leases"]
    return count


def by_replica(cluster: Cluster) -> dict[str, set[str]]:
    return {
        report["replica"]: {one["name"] for one in report["models"] if one["value"] == "loaded"}
        for report in cluster.reports()
        if report["url"]
    }


def is_spread(cluster: Cluster) -> bool:
    """Ask all models; a front that has yet to hear of a new replica fills the other one."""
    for model in MODELS:
        pid_of(cluster.ask(model))
    loaded = by_replica(cluster).values()
    return len(loaded) == 2 and all(loaded)


def test_a_request_goes_to_where_its_model_is_resident(cluster: Cluster) -> None:
    """A model that is loaded twice takes the room of another one."""
    first = {model: pid_of(cluster.ask(model)) for model in MODELS}
    again = {model: pid_of(cluster.ask(model)) for model in MODELS * 3}
    assert again == first
    support.until(
        lambda: sorted(map(len, by_replica(cluster).values())) == [2, 2], "two models on each node"
    )
    listed = cluster.client.get("/v1/models").json()["data"]
    assert [(one["id"], one["status"]["value"]) for one in listed] == [
        (model, "loaded") for model in MODELS
    ]
    budget = cluster.client.get("/api/models").json()["budget"]
    assert budget == [{"device": "Host", "total_mib": 500, "reserved_mib": 400}]
    assert cluster.ask("nobody").json()["error"]["code"] == "model_not_found"


def test_a_slot_is_named_after_its_node(cluster: Cluster) -> None:
    nodes = {one["node_id"] for one in cluster.replicas().values()}
    assert len(nodes) == 2
    for node in nodes:
        assert (cluster.state_dir / f"default-{node}").is_dir()


def test_only_fronts_may_use_the_listener_of_a_replica(cluster: Cluster) -> None:
    """It is on the network: without its key it would be a way past Serve."""
    for report in cluster.reports():
        answer = httpx.get(f"{report['url']}/v1/models", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert "key" not in report


def test_a_stream_passes_as_it_comes_and_ends_with_its_client(
    cluster: Cluster, tmp_path: Path
) -> None:
    left = tmp_path / "left"
    body = {"model": "a", "stream": 3, "until": str(tmp_path / "never"), "left": str(left)}
    with cluster.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        support.until(lambda: leases(cluster, "a") == 1, "the stream has a lease")
    support.until(lambda: leases(cluster, "a") == 0, "no lease is left")


def test_a_new_catalogue_is_taken_by_difference(cluster: Cluster, args: dict[str, Any]) -> None:
    """The replicas stay, and what has not changed stays resident."""
    before, pid = set(cluster.replicas()), pid_of(cluster.ask("a"))
    models = args["models"]["models"]
    more = {**models, "e": {**models["d"], "aliases": ["second"]}}
    cluster.deploy(args, user_config={"models": {**args["models"], "models": more}})
    support.until(lambda: cluster.ask("second").status_code == 200, "the new model answers")
    assert set(cluster.replicas()) == before
    assert pid_of(cluster.ask("a")) == pid
    cluster.deploy(args)
    support.until(lambda: cluster.ask("second").status_code == 404, "the new model is gone")
    assert set(cluster.replicas()) == before


def test_a_killed_replica_loses_no_request_and_leaves_no_server(
    cluster: Cluster, tmp_path: Path
) -> None:
    """2,000 requests without a first byte: each is answered once, by whichever replica.

    Ray kills the direct children of a worker, so a keeper that was one would leave the server of a
    wrapper script behind.
    """
    for model in MODELS:
        pid_of(cluster.ask(model))
    victim = cluster.where("a")
    replica = cluster.replicas()[victim["replica"]]
    others = {report["replica"] for report in cluster.reports()} - {victim["replica"]}
    theirs = {one for one in cluster.servers if str(replica["node_id"])[:20] in slot_of(one)}
    assert theirs
    stream = Stream(cluster, "a", tmp_path)
    answered: Counter[int] = Counter()
    middle = threading.Event()
    numbers = itertools.count()

    def ask(share: range) -> None:
        with httpx.Client(base_url=cluster.url, timeout=60, trust_env=False) as client:
            for number in share:
                if next(numbers) == 1000:
                    middle.set()
                body = {"model": MODELS[number % 4], "id": number}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, (number, answer.status_code, answer.text)
                answered[answer.json()["sent"]["id"]] += 1

    with ThreadPoolExecutor(8) as clients:
        done = clients.map(ask, [range(first, 2000, 8) for first in range(8)])
        assert middle.wait(120)
        kill(replica["pid"])
        began = time.monotonic()
        support.until(partial(are_gone, theirs), "its servers are gone", LIFE_S)
        print(f"servers gone after {(time.monotonic() - began) * 1000:.0f} ms")
        list(done)
    stream.go()
    stream.end()
    assert isinstance(stream.error, httpx.RemoteProtocolError), "its client knows that it was cut"
    assert answered == Counter(range(2000))
    fresh = {report["replica"] for report in cluster.until_open(2)} - others
    print(f"two replicas after {time.monotonic() - began:.1f} s")
    assert victim["replica"] not in fresh


def slot_of(pid: int) -> str:
    import psutil

    from orchestrator.server.slot import TOKEN_NAME

    try:
        return psutil.Process(pid).environ().get(TOKEN_NAME, "")
    except psutil.Error:
        return ""


def test_open_streams_outlive_an_update_of_their_replicas(
    cluster: Cluster, args: dict[str, Any], tmp_path: Path
) -> None:
    """Other options are a new version: each replica drains before it goes."""
    before = set(cluster.replicas())
    assert pid_of(cluster.ask("a"))
    stream = Stream(cluster, "a", tmp_path)
    where = cluster.where("a")["replica"]
    changed = {**args, "kill_grace_s": 2.0}
    update = threading.Thread(target=cluster.deploy, args=(changed,))
    update.start()
    support.until(partial(is_stopped, cluster, where), "its replica is stopped", 120)
    assert pid_of(cluster.ask("a")), "requests go on elsewhere"
    assert stream.finish()[-1] == "data: [DONE]"
    update.join(120)
    cluster.until_open(2)
    assert not before & set(cluster.replicas())


def test_a_smaller_cluster_finishes_its_streams(
    cluster: Cluster, args: dict[str, Any], tmp_path: Path
) -> None:
    """Streams of 30 s."""
    cluster.until_open(2)
    support.until(partial(is_spread, cluster), "models on each replica", 60)
    here, there = (sorted(models)[0] for models in by_replica(cluster).values())
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    began = time.monotonic()
    streams = [Stream(cluster, here, tmp_path / "1"), Stream(cluster, there, tmp_path / "2")]
    now = {**args, "kill_grace_s": 2.0}
    update = threading.Thread(target=cluster.deploy, args=(now,), kwargs={"num_replicas": 1})
    update.start()
    support.until(partial(is_stopped, cluster), "one replica is stopped", 120)
    assert time.monotonic() - began < STREAM_S
    threading.Event().wait(STREAM_S - (time.monotonic() - began))  # they last, nothing is awaited
    for stream in streams:
        assert stream.finish()[-1] == "data: [DONE]"
    update.join(120)
    assert len(cluster.replicas()) == 1
    for model in MODELS:
        pid_of(cluster.ask(model))
    cluster.deploy(now)
    cluster.until_open(2)


def test_a_killed_controller_stops_no_request(cluster: Cluster) -> None:
    pid = cluster.controller
    assert pid is not None
    kill(pid)
    for model in MODELS * 5:
        pid_of(cluster.ask(model))
    support.until(lambda: cluster.controller not in (pid, None), "another controller", 60)
    cluster.until_running()


def test_a_lost_node_leaves_no_server_and_its_models_go_on_elsewhere(cluster: Cluster) -> None:
    """Ray's worker ends when it notices that its raylet is gone; its servers with it."""
    lost = cluster.other_node
    for model in MODELS:
        pid_of(cluster.ask(model))
    theirs = {one for one in cluster.servers if lost[:20] in slot_of(one)}
    assert theirs
    (replica,) = [one["pid"] for one in cluster.replicas().values() if one["node_id"] == lost]
    cluster.kill_other_node()
    try:
        support.until(partial(are_gone, {replica}), "the replica is gone")
        support.until(partial(are_gone, theirs), "its servers are gone", LIFE_S)
        for model in MODELS:
            support.until(partial(answers, cluster, model), f"{model} answers", 60)
    finally:
        cluster.add_node()
        cluster.until_open(2)


def test_a_mistake_in_a_catalogue_is_told_and_changes_nothing(
    cluster: Cluster, args: dict[str, Any]
) -> None:
    before = {one["replica"] for one in cluster.until_open(2)}
    with pytest.raises(AssertionError, match="did you mean"):
        cluster.deploy({**args, "models": {"models": {"a": {"model_pth": "x"}}}})
    assert pid_of(cluster.ask("a"))
    assert {one["replica"] for one in cluster.until_open(2)} == before
    assert APP in cluster.details()["applications"]


@pytest.mark.external
def test_nodes_with_a_label_have_models_of_their_own_on_the_real_server(
    cluster: Cluster, args: dict[str, Any], llama_server: str
) -> None:
    """An update to the real llama.cpp, and a catalogue for the nodes of one room."""
    models = args["models"]["models"]
    pool = {"memory": "1 GiB", "min_resident_s": 0}
    cluster.deploy(
        {
            **args,
            "llama_server": llama_server,
            "models": {"pool": pool, "models": {"a": models["a"]}},
            "catalogues": {"room=two": {"pool": pool, "models": {"b": models["b"]}}},
        }
    )
    cluster.until_open(2)
    for model in "ab":
        answer = cluster.ask(model, messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.json()["usage"]["completion_tokens"]) == (model, 4)
    assert cluster.where("b")["node"] == cluster.other_node
    assert cluster.where("a")["node"] != cluster.other_node

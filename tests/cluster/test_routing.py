"""Which replica a request goes to, as values."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster import merging
from orchestrator.cluster.paths import (
    ByBody,
    ByName,
    Everywhere,
    Merged,
    Named,
    Own,
    Where,
    where,
)
from orchestrator.cluster.routing import ModelReport, ReplicaReport, choose, eviction_cost
from orchestrator.machine.states import State
from orchestrator.pool.ledger import Amounts

NEED = {"Host": 100}


def test_lists_of_models_can_be_merged_in_every_state() -> None:
    assert set(merging._STATES) == set(State)


def replica(name: str, free: int = 0, **models: Any) -> ReplicaReport:
    """A replica with so many MiB free; a model is its value, or fields of a `ModelReport`."""
    known = {
        model: fields if isinstance(fields, dict) else {"value": fields}
        for model, fields in models.items()
    }
    reports = [ModelReport(model, **{"mib": NEED, **fields}) for model, fields in known.items()]
    return ReplicaReport(
        name,
        f"node-{name}",
        url=f"http://{name}",
        key="secret",
        is_ready=True,
        free={"Host": free},
        models=tuple(reports),
        names={model: model for model in known},
    )


def chosen(*reports: ReplicaReport, asked: str | None = "m", tried: Any = ()) -> str | None:
    found = choose(reports, asked, tried)
    assert choose(reversed(reports), asked, tried) == found, "the order does not matter"
    return None if found is None else found.replica


RESIDENT = replica("resident", m="loaded")
LOADING = replica("loading", m="loading")
ROOM = replica("room", 100, m="unloaded")
EVICTS = replica("evicts", 0, m="unloaded", other={"value": "loaded", "unused_s": 60})
BUSY = replica("busy", 0, m="unloaded", other={"value": "loaded", "requests": 1})


def test_resident_goes_before_loading_before_room_before_eviction_before_none() -> None:
    order = [RESIDENT, LOADING, ROOM, EVICTS, BUSY]
    while order:
        assert chosen(*order) == order.pop(0).replica


def test_of_two_residents_the_one_with_fewer_requests_is_chosen() -> None:
    busy = replica("1", m={"value": "loaded", "requests": 3})
    assert chosen(busy, replica("2", m={"value": "loaded", "requests": 2})) == "2"


def test_a_replica_that_was_tried_or_does_not_listen_is_left_out() -> None:
    assert chosen(RESIDENT, ROOM, tried={"resident"}) == "room"
    assert chosen(RESIDENT, tried={"resident"}) is None
    assert chosen(ReplicaReport("new", "node")) is None


def test_of_two_evictions_the_cheaper_one_is_chosen() -> None:
    """Cost is size by time without use, as in the pool."""
    cheap = replica("1", m="unloaded", other={"value": "loaded", "unused_s": 600})
    dear = replica("2", m="unloaded", other={"value": "loaded", "unused_s": 6})
    assert chosen(dear, cheap) == "1"


@pytest.mark.parametrize(
    "other", [{"requests": 1}, {"pinned": True}, {"is_ours": False}, {"value": "loading"}]
)
def test_what_is_busy_pinned_or_elsewhere_makes_no_room(other: dict[str, Any]) -> None:
    report = replica("1", m="unloaded", other={"value": "loaded", **other})
    assert eviction_cost(report, Amounts.of(NEED)) is None


def test_a_model_that_is_nowhere_goes_to_the_same_replica_from_every_front() -> None:
    """And several models do not all go to one."""
    replicas = [replica(name, 10**6, **dict.fromkeys("abcdefgh", "unloaded")) for name in "123"]
    first = {model: chosen(*replicas, asked=model) for model in "abcdefgh"}
    assert first == {model: chosen(*replicas, asked=model) for model in "abcdefgh"}
    assert len(set(first.values())) > 1


def test_a_need_that_is_not_known_yet_is_that_of_another_replica() -> None:
    unknown = replica("1", 50, m={"value": "unloaded", "mib": {}})
    assert chosen(unknown, ROOM) == "room"


def test_a_failed_load_is_tried_elsewhere_first() -> None:
    assert chosen(replica("1", 900, m="failed"), ROOM) == "room"


def test_aliases_and_the_default_mean_their_entry() -> None:
    model = ModelReport("m", "loaded")
    report = ReplicaReport("1", "n", "http://1", models=(model,), names={"x:p": "m"}, default="m")
    assert report.find("x:p") is report.find(None) is model
    assert report.find("m") is None, "only what `names` has"


def test_no_report_shows_the_key_of_its_listener() -> None:
    assert "secret" not in repr(RESIDENT)
    assert "secret" not in str(RESIDENT.as_dict())


@pytest.mark.parametrize(
    ("method", "path", "whom"),
    [
        ("GET", "/v1/models", Merged()),
        ("GET", "/models", Merged()),
        ("GET", "/api/models", Merged()),
        ("GET", "/v1/models/a%2Fb:c", ByName("a/b:c")),
        ("POST", "/v1/chat/completions", ByBody()),
        ("POST", "/models/load", ByBody()),
        ("POST", "/models/unload", Everywhere()),
        ("POST", "/api/models", Everywhere()),
        ("POST", "/api/catalogue", Everywhere()),
        ("GET", "/api/models/a", ByName("a")),
        ("POST", "/api/models/a/load", ByName("a")),
        ("POST", "/api/models/a/unload", Everywhere()),
        ("DELETE", "/api/models/a", Everywhere()),
        ("POST", "/api/inference/load", ByName(None)),
        ("POST", "/api/inference/unload", Everywhere()),
        ("GET", "/api/events", Named()),
        ("GET", "/metrics", Named()),
        ("GET", "/healthz", Own()),
        ("GET", "/readyz", Own()),
        ("GET", "/api/replicas", Own()),
        ("GET", "/elsewhere", None),
    ],
)
def test_whom_a_path_is_for(method: str, path: str, whom: Where | None) -> None:
    assert where(method, path) == whom

"""The options of a facade and the arguments of its calls."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import InvalidRequest, LoadRequest, MalformedRequest, Orchestrator, RestartPolicy
from tests.kit.sentences import assert_sentence
from tests.kit.shell.harness import Harness

OPTIONS = (
    ({"abandoned_load": "keep"}, "abandoned_load", None),
    ({"drain_policy": "never"}, "drain_policy", "option.choice"),
    ({"kill_grace_s": -1}, "kill_grace_s", None),
    ({"drain_timeout_s": float("nan")}, "drain_timeout_s", None),
    ({"idle_ttl_s": 0}, "idle_ttl_s", None),
    ({"restart": "always"}, "restart", "option.restart"),
    ({"restart": RestartPolicy(backoff_s=-1)}, "restart.backoff_s", None),
    ({"restart": RestartPolicy(limit=0)}, "restart.limit", "option.restart_limit"),
    ({"restart": RestartPolicy(limit=True)}, "restart.limit", None),
    ({"models_dir": "/does/not/exist"}, "models_dir", None),
)


@pytest.mark.parametrize(("options", "field", "sentence"), OPTIONS, ids=str)
def test_an_unusable_option_is_refused(
    options: dict[str, Any], field: str, sentence: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Orchestrator(**options)
    assert refused.value.field == field
    if sentence is not None:
        assert_sentence(sentence, refused.value.message)


def test_cancel_needs_exactly_one_argument(harness: Harness) -> None:
    orch = harness.sync()
    for arguments in ((), ("x", 1)):
        with pytest.raises(InvalidRequest) as refused:
            orch.cancel(*arguments)
        assert refused.value.field == "load_request_id"
        assert_sentence("cancel.arguments", refused.value.message)
    assert harness.claims == 0


def test_a_request_and_fields_make_one_request(harness: Harness) -> None:
    with harness.sync() as orch:
        wanted = LoadRequest(model_path="A", n_parallel=2)
        assert orch.load(wanted, max_seq_length=512).n_parallel == 2
        assert orch.load("A", n_parallel=2, max_seq_length=512).status == "already_loaded"
        assert orch.load(model_path="A", n_parallel=2, max_seq_length=512).generation == 1
        with pytest.raises(MalformedRequest) as refused:
            orch.load("A", model_path="B")
        assert refused.value.field == "model_path"
        assert_sentence("model_path.twice", refused.value.message)


def test_server_is_not_asked_for_its_flags_when_the_model_is_loaded_already(
    harness: Harness,
) -> None:
    """A `--help` that hangs must not delay the answer."""
    asked: list[object] = []
    parts = harness.parts(catalogue=lambda *_: asked.append(None))
    with Orchestrator(llama_server="/llama", parts=parts) as orch:
        orch.load("A", llama_extra_args=["-c", "1"])
        assert len(asked) == 1
        for args in (["-c", "1"], None):
            assert orch.load("A", llama_extra_args=args).status == "already_loaded"
        assert len(asked) == 1
        orch.load("A", llama_extra_args=["-c", "2"])
        assert len(asked) == 2

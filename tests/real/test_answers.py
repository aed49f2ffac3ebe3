"""What a real model answers through the orchestrator: a load that only looks right is not enough.

A model of random weights answers noise with any setting; this one answers wrong, or nothing, when a
setting has not arrived or does harm.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator, State
from orchestrator.errors import Superseded
from tests.kit.process.read_back import ask, reported
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Background,
    is_running,
    transitions,
    until_state,
    watched,
)
from tests.kit.real_model import CAPITAL, ONE_THREAD, RIGHT, chat, post, text_of

pytestmark = [pytest.mark.external, pytest.mark.real]

DIMENSIONS = 576
TRAINED_CONTEXT = 8192


def test_answer_at_temperature_zero_is_right_and_the_same_again(
    either: Orchestrator, smollm2: str
) -> None:
    """Also after a reload."""
    either.load(smollm2, llama_extra_args=ONE_THREAD)
    answers = [text_of(chat(either, CAPITAL)) for _ in range(2)]
    either.load(smollm2, force_reload=True)
    answers.append(text_of(chat(either, CAPITAL)))
    assert len(set(answers)) == 1
    assert answers[0].startswith(RIGHT)


@pytest.mark.parametrize(
    "type_", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
)
def test_every_kv_type_arrives_and_the_answer_is_still_right(
    orch: Orchestrator, smollm2: str, type_: str
) -> None:
    outcome = orch.load(smollm2, cache_type_kv=type_)
    assert outcome.cache_type_kv == type_
    assert reported(orch).kv == (type_, type_)
    assert text_of(chat(orch, CAPITAL, max_tokens=12)).startswith(RIGHT)


@pytest.mark.parametrize(
    ("requested", "context"),
    [(256, 256), (2048, 2048), (0, TRAINED_CONTEXT), (2 * TRAINED_CONTEXT, TRAINED_CONTEXT)],
)
def test_context_is_what_the_server_reports(
    orch: Orchestrator, smollm2: str, requested: int, context: int
) -> None:
    """Auto is the model's own, and the server gives no request more than the model knows."""
    outcome = orch.load(smollm2, max_seq_length=requested, n_parallel=1)
    assert outcome.requested_context_length == requested
    assert outcome.context_length == reported(orch).context == context
    assert text_of(chat(orch, CAPITAL, max_tokens=12)).startswith(RIGHT)


def test_prompt_that_does_not_fit_fits_after_an_apply(orch: Orchestrator, smollm2: str) -> None:
    prompt = {"prompt": "one two three " * 88, "n_predict": 1, "cache_prompt": False}
    orch.load(smollm2, max_seq_length=256, n_parallel=1)
    status, answer = post(orch, "/completion", prompt)
    assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")
    assert orch.load(smollm2, max_seq_length=512, n_parallel=1).status == "loaded"
    status, answer = post(orch, "/completion", prompt)
    assert status == 200
    assert 256 < answer["tokens_evaluated"] < 512


TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
    "How vexingly quick daft zebras jump over the fence."
)
MODES = {
    # the value, the implementation that the server reports, whether it drafts parts of this answer
    "off": (None, False),
    "default": ("ngram-mod", True),
    "ngram-mod": ("ngram-mod", True),
    "ngram-simple": ("ngram-simple", True),
    "ngram-cache": ("ngram-cache", True),
    "ngram-map-k": ("ngram-map-k", False),
    "ngram-map-k4v": ("ngram-map-k4v", False),
}


@pytest.mark.parametrize("mode", MODES)
def test_drafting_without_a_draft_model_changes_the_speed_and_never_the_answer(
    orch: Orchestrator, smollm2: str, mode: str
) -> None:
    implementation, drafts = MODES[mode]
    outcome = orch.load(smollm2, speculative_type=mode, n_parallel=1)
    assert outcome.speculative_type == mode
    assert reported(orch).drafting == ((implementation,) if implementation else ())
    answer = chat(orch, f"Repeat the following text three times:\n{TEXT} ", max_tokens=60)
    assert text_of(answer) == TEXT
    assert (answer["timings"].get("draft_n_accepted", 0) > 0) is drafts


def test_every_mode_without_a_draft_model_is_tested(llama_server: str) -> None:
    """The binary's own help lists them."""
    done = subprocess.run([llama_server, "--help"], capture_output=True, text=True, check=True)
    listed = re.search(r"--spec-type (\S+)", done.stdout)
    assert listed
    assert {name for name in listed[1].split(",") if name.startswith("ngram")} == MODES.keys() - {
        *("off", "default")
    }


def test_two_quick_applies_leave_one_server_with_the_second_settings(
    either: Orchestrator, smollm2: str, state_dir: Path, tmp_path: Path
) -> None:
    """The second one comes in the middle of the first one's start."""
    with watched(state_dir, tmp_path / "watched.json") as report:
        first = Background(
            either.load,
            smollm2,
            max_seq_length=512,
            llama_extra_args=[*ONE_THREAD, "--top-k", "7"],
        )
        until_state(either, State.WAITING_HEALTH)
        (early,) = servers_of(state_dir)
        arguments = [*ONE_THREAD, "--top-k", "9"]
        outcome = either.load(smollm2, max_seq_length=1024, llama_extra_args=arguments)
        assert isinstance(first.error(), Superseded)
        assert servers_of(state_dir) == {outcome.pid}
        assert not is_running(early)
        settings = ask(outcome, "/props")["default_generation_settings"]
        assert settings["n_ctx"] == outcome.context_length == 1024
        assert settings["params"]["top_k"] == 9
        assert text_of(chat(either, CAPITAL)).startswith(RIGHT)
        either.unload()
        seen = report()
    assert seen["pairs"] == []
    assert {entry["pid"] for entry in seen["seen"]} >= {early, outcome.pid}
    assert seen["left"] == []


def test_an_answer_is_finished_before_two_quick_applies_take_its_server(
    orch: Orchestrator, smollm2: str, state_dir: Path
) -> None:
    """The second Apply supersedes the first one, which waits for the answer."""
    old = orch.load(smollm2, n_parallel=1)
    asked = threading.Event()
    answers: list[Any] = []

    def read() -> None:
        with orch.lease():
            asked.set()
            answers.append(chat(orch, CAPITAL, max_tokens=48))

    reading = Background(read)
    assert asked.wait(30)
    mark = orch.last_event_id
    clicks = [Background(orch.load, smollm2, n_parallel=1, max_seq_length=512)]
    until_state(orch, State.KILLING)
    clicks.append(Background(orch.load, smollm2, n_parallel=1, max_seq_length=1024))
    assert isinstance(clicks[0].error(), Superseded)
    outcome = clicks[1].result()
    reading.result()
    assert answers[0]["usage"]["completion_tokens"] == 48
    assert text_of(answers[0]).startswith(RIGHT)
    assert servers_of(state_dir) == {outcome.pid} != {old.pid}
    assert reported(orch).context == 1024
    states = [event.data["dest"] for event in transitions(orch) if event.id > mark]
    assert states.count("Spawning") == 1


def test_embeddings_of_sentences_that_mean_the_same_are_nearer(
    either: Orchestrator, smollm2: str
) -> None:
    either.load(smollm2, kind="embedding", pooling="mean", llama_extra_args=ONE_THREAD)
    pairs = (
        ("A cat is sleeping on the sofa.", "A kitten naps on the couch."),
        ("Share prices fell on Monday.", "The stock market dropped at the start of the week."),
    )
    status, answer = post(either, "/v1/embeddings", {"input": [*pairs[0], *pairs[1]]})
    assert status == 200, answer
    vectors = [each["embedding"] for each in sorted(answer["data"], key=lambda x: x["index"])]
    assert {len(vector) for vector in vectors} == {DIMENSIONS}
    assert [math.hypot(*vector) for vector in vectors] == [pytest.approx(1)] * 4
    near = max(math.dist(*vectors[:2]), math.dist(*vectors[2:]))
    far = [math.dist(cat, share) for cat in vectors[:2] for share in vectors[2:]]
    assert near * 1.1 < min(far)


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}


def test_answer_obeys_a_grammar(either: Orchestrator, smollm2: str) -> None:
    """Which it does not do by itself."""
    either.load(smollm2, llama_extra_args=ONE_THREAD)
    free = text_of(chat(either, "Is Paris the capital of France?"))
    assert free not in {"yes", "no"}
    for city in ("Paris", "Rome"):
        question = f"Is {city} the capital of France?"
        bound = text_of(chat(either, question, grammar='root ::= "yes" | "no"'))
        assert bound in {"yes", "no"}

    question = "Which city is the capital of France?"
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(text_of(chat(either, question)))
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    found = json.loads(text_of(chat(either, question, max_tokens=48, response_format=schema)))
    assert found.keys() == {"city", "is_capital"}
    assert "Paris" in found["city"]
    assert isinstance(found["is_capital"], bool)

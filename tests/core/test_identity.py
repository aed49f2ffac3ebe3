"""When two loads are the same, why a reload is needed, and what extra args are inherited."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.settings.files import FileIdentity, HubModel, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import (
    ReloadReason,
    ServerBinary,
    Source,
    differences,
    is_same_model,
)
from tests.kit.sentences import assert_sentence
from tests.kit.settings import (
    PROJECTOR,
    REQUESTS,
    SECRET,
    file,
    local,
    not_downloaded,
    on_hub,
    repeatable,
    target,
)


def shards(*changes: dict[str, int], projector: FileIdentity | None = None) -> ModelFiles:
    files = tuple(file(f"/models/a-{i}.gguf", **change) for i, change in enumerate(changes))
    return ModelFiles(files, projector, "Q4_K_M")


VISION = shards({}, projector=PROJECTOR)
IDENTITY: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model_path", {}, {"model": local("/models/b.gguf")}),
    *[
        ("model_path", {"model": shards({}, {})}, {"model": shards({}, {change: 99})})
        for change in ("device", "inode", "size_bytes", "mtime_ns")
    ],
    ("model_path", {"model": shards({}, {})}, {"model": shards({})}),
    ("gguf_variant", {}, {"model": local(variant="Q8_0")}),
    ("model_path", {"model": on_hub()}, {"model": on_hub(repo="org/b")}),
    ("gguf_variant", {"model": on_hub()}, {"model": on_hub(variant="F16")}),
    ("revision", {"model": on_hub()}, {"model": on_hub(commit="b" * 40)}),
    (
        "mmproj_path",
        {"model": shards({}, projector=PROJECTOR)},
        {"model": shards({}, projector=replace(PROJECTOR, mtime_ns=99))},
    ),
    ("max_seq_length", {"max_seq_length": 4096}, {"max_seq_length": 0}),
    ("cache_type_kv", {}, {"cache_type_kv": "q8_0"}),
    ("speculative_type", {}, {"speculative_type": "default"}),
    ("chat_template_override", {}, {"chat_template_override": "{{ x }}"}),
    ("n_parallel", {"n_parallel": 1}, {"n_parallel": 2}),
    ("kind", {"cache_ram_mib": 0}, {"kind": "embedding"}),
    ("kind", {"kind": "rerank"}, {"kind": "embedding"}),
    ("pooling", {"kind": "embedding"}, {"kind": "embedding", "pooling": "mean"}),
    ("cache_ram_mib", {}, {"cache_ram_mib": 0}),
    ("cache_ram_mib", {"kind": "rerank"}, {"kind": "rerank", "cache_ram_mib": 512}),
    ("llama_extra_args", {"llama_extra_args": ["-t", "4"]}, {"llama_extra_args": ["-t", "8"]}),
    (
        "llama_extra_args",
        {"llama_extra_args": ["--a", "--b"]},
        {"llama_extra_args": ["--b", "--a"]},
    ),
    (
        "llama_server",
        {},
        {"server": ServerBinary("embedded", ("/bin/python",), file("/bin/llama-server"))},
    ),
    (
        "llama_server",
        {},
        {"server": ServerBinary("external", ("/bin/s",), file("/bin/s", mtime_ns=9))},
    ),
]


@pytest.mark.parametrize(("field", "running", "requested"), IDENTITY)
def test_a_changed_setting_is_the_one_reload_reason(
    field: str, running: dict[str, Any], requested: dict[str, Any]
) -> None:
    """B28: a changed setting is never answered with `already_loaded`."""
    ours, theirs = target(**running), target(**requested)
    assert [reason.field for reason in differences(ours, theirs)] == [field]
    assert [reason.field for reason in differences(theirs, ours)] == [field]
    reason = differences(ours, theirs)[0].as_dict()
    assert set(reason) == {"field", "running", "requested"}
    assert reason["running"] != reason["requested"]
    json.dumps(reason)
    assert differences(ours, ours) == ()
    assert differences(theirs, theirs) == ()


def test_hub_model_is_identified_by_repo_variant_and_commit_not_by_its_files() -> None:
    ours = on_hub()
    hub = HubModel("Org/A", "main", "a" * 40)
    moved = replace(ours, weights=(file("/elsewhere/x.gguf"),), hub=hub)
    assert differences(target(model=ours), target(model=moved)) == ()


def test_unresolved_hub_model_is_compared_as_requested() -> None:
    """Two loads in a row are one even before the first has its listing, and a load may find its
    model running while the cache is not available.
    """
    nothing = target(model=not_downloaded())
    assert differences(nothing, target(model=not_downloaded())) == ()
    assert differences(target(model=on_hub()), nothing) == ()
    q8 = target(model=not_downloaded("q8_0"), gguf_variant="q8_0")
    running = target(model=on_hub(), gguf_variant="Q8_0")
    assert differences(running, q8) == ()
    assert [r.field for r in differences(nothing, q8)] == ["gguf_variant"]
    parallel = target(model=not_downloaded(), n_parallel=2)
    assert [r.field for r in differences(nothing, parallel)] == ["n_parallel"]
    assert [r.field for r in differences(parallel, target(model=on_hub()))] == ["n_parallel"]
    branch = target(model=not_downloaded(revision="dev"))
    assert [r.field for r in differences(nothing, branch)] == ["revision"]
    by_default = target(model=on_hub())
    assert differences(by_default, q8) == differences(q8, by_default) == ()
    f16 = target(model=not_downloaded("f16"), gguf_variant="f16")
    shown = ReloadReason("gguf_variant", running="Q8_0", requested="F16")
    assert differences(running, f16) == (shown,)
    vision = target(model=not_downloaded(), mmproj_path="p.gguf")
    shown = ReloadReason("mmproj_path", running=None, requested="p.gguf")
    assert differences(target(model=on_hub()), vision) == (shown,)


def test_reason_shows_a_file_as_text_and_shards_as_a_list() -> None:
    (reason,) = differences(target(), target(model=shards({}, {})))
    assert_sentence("settings.file", str(reason.running), path="/models/a.gguf")
    assert reason.requested == [
        str(reason.running).replace("a.gguf", f"a-{shard}.gguf") for shard in (0, 1)
    ]
    (reason,) = differences(target(), target(llama_extra_args=["-t", "4"]))
    assert (reason.running, reason.requested) == ([], ["-t", "4"])


def test_every_part_of_the_identity_has_a_case_above() -> None:
    assert {field for field, _, _ in IDENTITY} == set(target().identity())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hf_token", SECRET),
        ("revision", "main"),
        ("force_reload", True),
        ("on_busy", "queue"),
        ("load_request_id", "x"),
        ("prefetch", True),
        ("restore_previous", True),
        ("idle_ttl_s", 5.0),
        ("pinned", True),
        ("stall_timeout_s", 5.0),
        ("deadline_s", 5.0),
        ("speculative_type", "off"),
        ("llama_extra_args", []),
        ("gguf_variant", "q4_k_m"),
        ("model_path", "/models/../models/a.gguf"),
        ("mmproj_path", "/elsewhere.gguf"),
    ],
)
def test_setting_that_the_server_does_not_see_is_no_reload_reason(
    field: str, value: object
) -> None:
    """B32, B34: a difference that no reload removes would reload on every Apply."""
    assert differences(target(), target(**{field: value})) == ()


def test_drafting_is_off_for_a_vision_model() -> None:
    """B32: otherwise a value that never applies would reload it on every Apply."""
    wanted = target(model=VISION, speculative_type="default")
    assert wanted.is_vision
    assert wanted.speculative_type is None
    assert differences(target(model=VISION), wanted) == ()


SPELLINGS: dict[str, list[list[Any]]] = {
    "gguf_variant": [[None, "", "  "], ["Q4_K_M", " Q4_K_M\t"]],
    "max_seq_length": [[0], [4096]],
    "cache_type_kv": [[None, "", " "], ["q8_0", " Q8_0", "q8_0\n"]],
    "speculative_type": [
        [None, "", " ", "off", "OFF", " Off ", "none"],
        ["ngram-mod", " NGRAM-MOD "],
        ["default", "Default"],
    ],
    "chat_template_override": [[None, "", " \n"], ["{{ x }}"], [" {{ x }}"]],
    "llama_extra_args": [[[], ()], [["-t", "4"], ("-t", "4")], [["4", "-t"]]],
    "n_parallel": [[None], [1], [2]],
}
CHOICES = st.fixed_dictionaries(
    {
        name: st.sampled_from(
            [(at, one, same) for at, group in enumerate(groups) for one in group for same in group]
        )
        for name, groups in SPELLINGS.items()
    }
)


@repeatable
@given(CHOICES, CHOICES)
def test_requests_are_the_same_exactly_if_only_their_spelling_differs(
    ours: dict[str, tuple[int, Any, Any]], theirs: dict[str, tuple[int, Any, Any]]
) -> None:
    """B28, B35."""
    one, same = (
        target(**{name: choice[which] for name, choice in ours.items()}) for which in (1, 2)
    )
    assert differences(one, same) == ()
    other = target(**{name: choice[1] for name, choice in theirs.items()})
    changed = {name for name in SPELLINGS if ours[name][0] != theirs[name][0]}
    changed.discard("gguf_variant")  # the resolved variant is compared
    found = differences(one, other)
    assert {reason.field for reason in found} == changed
    for reason in found:
        assert reason.running != reason.requested
    json.dumps([reason.as_dict() for reason in found])


@repeatable
@given(CHOICES, st.sampled_from(["default", "ngram-mod", "off"]))
def test_drafting_mode_never_reloads_a_vision_model(
    chosen: dict[str, tuple[int, Any, Any]], mode: str
) -> None:
    values = {name: choice[1] for name, choice in chosen.items()}
    running = target(model=VISION, **values)
    wanted = target(model=VISION, **{**values, "speculative_type": mode})
    assert differences(running, wanted) == ()
    as_text = target(**values)
    assert "mmproj_path" in {reason.field for reason in differences(running, as_text)}


@repeatable
@given(REQUESTS, REQUESTS)
def test_differences_are_symmetric_and_empty_for_the_same(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    ours, theirs = target(LoadRequest.from_dict(one)), target(LoadRequest.from_dict(other))
    assert differences(ours, ours) == ()
    forth, back = differences(ours, theirs), differences(theirs, ours)
    assert [r.field for r in forth] == [r.field for r in back]
    assert (forth == ()) == (ours.identity() == theirs.identity())


# ----------------------------------------------------------------------------------- inheritance


def test_only_omitted_args_are_inherited() -> None:
    """B35, B37: omitted = inherit, empty = none, a list = exactly these."""
    committed = {target().source: ("--temp", "0.5")}
    assert target().inheriting(committed).extra_args == ("--temp", "0.5")
    assert target(llama_extra_args=[]).inheriting(committed).extra_args == ()
    assert target(llama_extra_args=["-t", "4"]).inheriting(committed).extra_args == ("-t", "4")
    assert target().inheriting({}).extra_args == ()


@pytest.mark.parametrize(
    "other",
    [
        local("/models/b.gguf"),
        local(variant="Q8_0"),
        local(variant=None),
    ],
)
def test_args_are_not_inherited_by_another_source(other: ModelFiles) -> None:
    """B40: not by another model, and not by another variant."""
    committed = {target().source: ("--temp", "0.5")}
    assert target(model=other).inheriting(committed).extra_args == ()


def test_source_has_the_resolved_variant_not_the_requested_one() -> None:
    """B40: a variant that was picked inherits what was set for it by name."""
    assert target(gguf_variant="Q4_K_M").source == target().source


def test_unresolved_hub_model_inherits_once_its_variant_is_known() -> None:
    """B40: inherited by the resolved variant."""
    committed: dict[Source, tuple[str, ...]] = {("org/a", "Q8_0", "chat"): ("--seed", "7")}
    before = target(model=not_downloaded(), llama_extra_args=None).inheriting(committed)
    assert before.request.llama_extra_args is None
    found = replace(before, model=on_hub()).inheriting(committed)
    assert found.extra_args == ("--seed", "7")
    assert replace(before, model=on_hub(variant="F16")).inheriting(committed).extra_args == ()
    vectors = target(model=on_hub(), kind="embedding", llama_extra_args=None)
    assert vectors.inheriting(committed).extra_args == (), "not by another kind"


@pytest.mark.parametrize(
    ("field", "value", "left"),
    [
        ("max_seq_length", 8192, ("--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default")),
        ("cache_type_kv", "q8_0", ("-c", "4096", "--jinja", "--temp", "-1", "--spec-default")),
        (
            "speculative_type",
            "ngram-mod",
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16"),
        ),
        (
            "chat_template_override",
            "x",
            ("-c", "4096", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
        (
            "cache_ram_mib",
            0,
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
        (
            "n_parallel",
            2,
            ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default"),
        ),
    ],
)
def test_a_field_replaces_its_inherited_flags_and_no_explicit_ones(
    field: str, value: object, left: tuple[str, ...]
) -> None:
    """B38: an inherited `-c 4096` would win over the new context."""
    args = ("-c", "4096", "--jinja", "--temp", "-1", "-ctk", "f16", "--spec-default")
    committed = {target().source: args}
    assert target(**{field: value}).inheriting(committed).extra_args == left
    explicit = target(**{field: value, "llama_extra_args": list(args)})
    assert explicit.inheriting(committed).extra_args == args


@repeatable
@given(REQUESTS, st.lists(st.sampled_from(["-c", "1", "--jinja", "--temp", "-1"]), max_size=6))
def test_inherited_args_are_then_explicit(values: dict[str, Any], args: list[str]) -> None:
    """Looking the model up again must not change them."""
    wanted = target(LoadRequest.from_dict(values))
    once = wanted.inheriting({wanted.source: tuple(args)})
    assert once.inheriting({wanted.source: ("--other",)}) == once
    assert once.request.llama_extra_args is not None


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("org/a", True),
        ("ORG/A", True),
        ("org/a:q8_0", True),
        ("org/a:F16", False),
        ("https://huggingface.co/Org/A", True),
        ("https://huggingface.co/org/b", False),
        ("org/b", False),
        ("a", False),
    ],
)
def test_hub_model_is_called_by_its_repo_in_any_case(name: str, is_it: bool) -> None:
    assert target(model=on_hub()).is_called(name) == is_it


def test_model_without_a_known_variant_is_called_by_its_repo_only() -> None:
    unresolved = target(model=not_downloaded())
    assert unresolved.is_called("org/a")
    assert not unresolved.is_called("org/a:q8_0")


@pytest.mark.parametrize(
    ("values", "is_it"),
    [
        ({}, True),
        ({"max_seq_length": 4096, "llama_extra_args": ["-t", "4"]}, True),
        ({"model": on_hub("org/b")}, False),
        ({"model": on_hub(variant="F16")}, False),
        ({"model": on_hub(commit="b" * 40)}, False),
        ({"model": replace(on_hub(), projector=PROJECTOR)}, False),
    ],
)
def test_same_model_is_of_the_same_files_whatever_the_settings(
    values: dict[str, Any], is_it: bool
) -> None:
    """Callers of one prefetch share one download."""
    one, other = target(model=on_hub()), target(**{"model": on_hub(), **values})
    assert is_same_model(one, other) == is_same_model(other, one) == is_it


def test_projectors_are_compared_as_requested_while_one_model_is_not_on_disk() -> None:
    on_disk = replace(on_hub(), projector=PROJECTOR)
    listed = replace(on_disk, weights=(), projector=None)
    ours = target(model=on_disk, mmproj_path="p.gguf")
    assert differences(ours, target(model=listed, mmproj_path="p.gguf")) == ()
    other = target(model=listed, mmproj_path="q.gguf")
    for running, requested in ((ours, other), (other, ours)):
        paths = running.request.mmproj_path, requested.request.mmproj_path
        assert differences(running, requested) == (ReloadReason("mmproj_path", *paths),)


def test_commit_that_runs_may_be_requested_by_its_hash() -> None:
    running = target(model=on_hub())
    for commit, fields in (("a" * 40, []), ("b" * 40, ["revision"])):
        wanted = target(model=not_downloaded(revision=commit), revision=commit)
        assert [reason.field for reason in differences(running, wanted)] == fields

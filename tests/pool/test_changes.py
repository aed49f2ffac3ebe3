"""A catalogue that is read again, and entries that come and go at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import InvalidCatalogue, InvalidRequest, MalformedRequest, NameTaken
from orchestrator.pool.catalogue import (
    Catalogue,
    Changes,
    catalogue_of,
    check_pins,
    difference,
    merge,
    read_catalogue,
    with_entry,
    without_entry,
)
from orchestrator.settings.fields import SETTINGS
from tests.kit.catalogues import catalogue, models
from tests.kit.labels import label
from tests.kit.sentences import assert_sentence

# ------------------------------------------------------------------------------- the difference


def test_a_change_concerns_only_its_own_entry() -> None:
    """A changed line must not restart the other models."""
    old = models(a={}, b={}, c={}, d={"n_parallel": 1})
    new = models(e={}, d={"n_parallel": 2}, c={"weight": 2}, b={})
    changes = difference(old, new)
    assert changes == Changes(("e",), ("d", "c"), ("a",), ("b",))
    assert [n for n in changes.changed if old.models[n].reloads(new.models[n])] == ["d"]


def test_nothing_changes_where_only_the_lines_do() -> None:
    old = catalogue("[models.a]\nmodel_path = 'org/a'")
    new = catalogue("# more\n\n[models.a]\n\nmodel_path = 'org/a'")
    assert difference(old, new) == Changes(unchanged=("a",))
    assert old == new


RELOADS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"model_path": "org/other"}),
    ({}, {"model_path": "org/a:Q8_0"}),
    ({}, {"gguf_variant": "Q8_0"}),
    ({}, {"revision": "v2"}),
    ({}, {"mmproj_path": "p.gguf"}),
    ({}, {"kind": "embedding"}),
    ({"kind": "rerank"}, {"kind": "rerank", "pooling": "rank"}),
    ({}, {"cache_ram_mib": 0}),
    ({}, {"max_seq_length": 4096}),
    ({}, {"cache_type_kv": "q8_0"}),
    ({}, {"speculative_type": "default"}),
    ({}, {"chat_template_override": "{{ x }}"}),
    ({}, {"llama_extra_args": ["--mlock"]}),
    ({"llama_extra_args": ["-t", "1"]}, {"llama_extra_args": ["-t", "2"]}),
    ({}, {"n_parallel": 2}),
    ({}, {"base_url": "http://h"}),
    ({"base_url": "http://h"}, {"base_url": "http://g"}),
    ({"base_url": "http://h"}, {"base_url": "http://h", "upstream_model": "m"}),
]
AT_ONCE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"aliases": ["x"]}),
    ({}, {"presets": {"p": {"top_k": 1}}}),
    ({"presets": {"p": {"top_k": 1}}}, {"presets": {"p": {"top_k": 2}}}),
    ({}, {"weight": 2}),
    ({}, {"memory": "1 GiB"}),
    ({}, {"group": "g"}),
    ({}, {"pinned": True}),
    ({}, {"idle_ttl_s": 5}),
    ({}, {"hf_token": "hf_x"}),
    ({}, {"stall_timeout_s": 5}),
    ({}, {"deadline_s": 5}),
    ({}, {"speculative_type": "off"}),
    ({}, {"model_path": "ORG/a"}),
    ({"model_path": "org/a:q8_0"}, {"model_path": "org/a", "gguf_variant": "Q8_0"}),
    ({"base_url": "http://h"}, {"base_url": "http://h", "api_key_file": "k"}),
    ({"base_url": "http://h"}, {"base_url": "http://h", "kind": "embedding"}),
    ({"base_url": "http://h"}, {"base_url": "http://h", "weight": 2}),
    ({"kind": "embedding"}, {"kind": "embedding", "cache_ram_mib": 0}),
]


@pytest.mark.parametrize(("old", "new"), RELOADS, ids=label)
def test_what_the_server_is_made_of_needs_a_reload(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    one, other = models(a=old), models(a=new)
    assert difference(one, other) == Changes(changed=("a",))
    assert one.models["a"].reloads(other.models["a"])
    assert other.models["a"].reloads(one.models["a"])


@pytest.mark.parametrize(("old", "new"), AT_ONCE, ids=label)
def test_everything_else_applies_at_once(old: dict[str, Any], new: dict[str, Any]) -> None:
    one, other = models(a=old), models(a=new)
    assert difference(one, other) == Changes(changed=("a",))
    assert not one.models["a"].reloads(other.models["a"])


def test_every_setting_of_a_load_either_reloads_or_applies_at_once() -> None:
    """A new one must not be forgotten here."""
    changed = {name for pairs in (RELOADS, AT_ONCE) for pair in pairs for name in pair[1]}
    from_http = {"on_busy", "load_request_id", "prefetch", "force_reload", "restore_previous"}
    assert SETTINGS.keys() - from_http <= changed


def test_a_default_of_the_pool_changes_the_models_that_have_it() -> None:
    text = "models.a.model_path = 'org/a'\nmodels.b = { model_path = 'org/a', cache_ram_mib = 1 }"
    old, new = catalogue(text), catalogue("pool.cache_ram_mib = 2\n" + text)
    assert difference(old, new) == Changes(changed=("a",), unchanged=("b",))
    assert old.models["a"].reloads(new.models["a"])


# ----------------------------------------------------------------------------------- run time


def added(name: str, fields: dict[str, Any], *, is_remote: bool = True) -> Catalogue:
    base = models(chat={"aliases": ["fast"], "presets": {"p": {}}, "pinned": True, "group": "g"})
    return with_entry(base, name, fields, is_remote=is_remote)


def test_an_added_entry_is_like_one_of_the_file() -> None:
    made = added("new", {"model_path": "org/b", "aliases": ["n"], "weight": 2})
    alone = models(new={"model_path": "org/b", "aliases": ["n"], "weight": 2})
    assert list(made.models) == ["chat", "new"]
    assert made.models["new"] == alone.models["new"]
    match = made.find("n")
    assert match is not None
    assert match.entry.name == "new"


@pytest.mark.parametrize("is_remote", [True, False])
def test_paths_of_a_caller_are_as_a_load_would_take_them(is_remote: bool) -> None:
    """Over HTTP they stay as they are, because the rules for such callers judge and hide them."""
    request = added("new", {"model_path": "./m.gguf"}, is_remote=is_remote).models["new"].request
    assert request is not None
    assert request.model_path == ("./m.gguf" if is_remote else str(Path.cwd() / "m.gguf"))


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("chat", {}, "name"),
        ("fast", {"model_path": "org/b"}, "name"),
        ("new", {"model_path": "org/b", "aliases": ["chat"]}, "aliases"),
        ("new", {"model_path": "org/b", "aliases": ["fast"]}, "aliases"),
        ("new", {"model_path": "org/b", "aliases": ["chat:p"]}, "aliases"),
        ("new", {"model_path": "org/b", "aliases": ["fast:p"]}, "aliases"),
    ],
)
def test_a_name_that_exists_is_taken(name: str, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(NameTaken) as caught:
        added(name, fields)
    assert (caught.value.category, caught.value.status) == ("name_taken", 409)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "fields", "kind", "field"),
    [
        ("a b", {"model_path": "org/b"}, InvalidRequest, "name"),
        ("a:b", {"model_path": "org/b"}, InvalidRequest, "name"),
        ("new", {}, MalformedRequest, "model_path"),
        ("new", {"model_path": "org/b", "wieght": 1}, MalformedRequest, "wieght"),
        ("new", {"model_path": "org/b", "weight": "1"}, MalformedRequest, "weight"),
        ("new", {"model_path": "org/b", "weight": 0}, InvalidRequest, "weight"),
        ("new", {"model_path": "org/b", "on_busy": "queue"}, InvalidRequest, "on_busy"),
        ("new", {"model_path": "org/b", "pooling": "mean"}, InvalidRequest, "pooling"),
        ("new", {"model_path": "org/b", "aliases": ["new"]}, InvalidRequest, "aliases"),
        ("new", {"model_path": "org/b", "pinned": True, "group": "g"}, InvalidRequest, "pinned"),
        (
            *("new", {"model_path": "org/b", "presets": {"p": {"model": "x"}}}),
            *(InvalidRequest, "presets.p.model"),
        ),
        ("new", {"base_url": "http://h"}, InvalidRequest, "base_url"),
        ("new", {"model_path": "org/b", "api_key_file": "k"}, InvalidRequest, "api_key_file"),
        ("new", {"model_path": "org/b", "upstream_model": "m"}, InvalidRequest, "upstream_model"),
    ],
    ids=label,
)
def test_a_wrong_field_of_an_added_entry_is_an_error_of_a_request(
    name: str, fields: dict[str, Any], kind: type[InvalidRequest], field: str
) -> None:
    """A caller of HTTP has no catalogue whose place could be named."""
    with pytest.raises(InvalidRequest) as caught:
        added(name, fields)
    assert type(caught.value) is kind
    assert caught.value.field == field


def test_a_program_may_add_another_server() -> None:
    made = added("there", {"base_url": "http://h", "api_key_file": "k"}, is_remote=False)
    assert made.models["there"].api_key_file == Path.cwd() / "k"


def test_sentences_of_added_entries() -> None:
    given: dict[str, dict[str, Any]] = {
        "catalogue.over_http": {"base_url": "http://h"},
        "catalogue.added_taken": {"model_path": "org/b", "aliases": ["fast"]},
    }
    for key, fields in given.items():
        with pytest.raises((InvalidRequest, NameTaken)) as caught:
            added("new", fields)
        assert_sentence(key, caught.value.message)
    with pytest.raises(NameTaken) as taken:
        added("chat", {})
    assert_sentence("catalogue.exists", taken.value.message)


def test_a_removed_entry_is_gone_with_its_names() -> None:
    base = catalogue_of(
        {
            "pool": {"default": "a", "preload": ["a"]},
            "models": {
                "a": {"model_path": "org/a", "aliases": ["x"]},
                "b": {"model_path": "org/b"},
            },
        }
    )
    made = without_entry(base, "a")
    assert list(made.models) == ["b"]
    assert (made.find("a"), made.find("x"), made.default) == (None, None, None)
    assert list(base.models) == ["a", "b"]
    with pytest.raises(KeyError):
        without_entry(made, "a")


# ------------------------------------------------------------------------------------ re-reads


def test_an_added_entry_survives_a_re_read() -> None:
    runtime = {"new": added("new", {"model_path": "org/b"}).models["new"]}
    merged = merge(models(chat={}), runtime)
    assert list(merged.models) == ["chat", "new"]
    assert merged.models["new"] is runtime["new"]
    assert merged.find("new") is not None


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("[models.new]\nmodel_path = 'org/c'", 1, "models.new"),
        ("[models.a]\nmodel_path = 'org/c'\naliases = ['new']", 3, "models.a.aliases"),
        ("[models.a]\nmodel_path = 'org/c'\naliases = ['n']", 3, "models.a.aliases"),
        ("[models.a]\nmodel_path = 'org/c'\naliases = ['new:p']", 3, "models.a.aliases"),
        ("[models.a]\nmodel_path = 'org/c'\npresets.q = {}", 3, "models.a.presets.q"),
        ("[models.b]\nmodel_path = 'b'\ngroup = 'g'\npinned = true", 4, "models.b.pinned"),
        (
            "pool.memory = '1 GiB'\n[models.b]\nmodel_path = 'b'\nmemory = '1 GiB'\npinned = true",
            *(5, "models.b.pinned"),
        ),
    ],
)
def test_a_file_that_takes_a_name_of_an_added_entry_is_refused_with_its_place(
    text: str, line: int, field: str, tmp_path: Path
) -> None:
    """Neither may win in silence: both are in use."""
    path = tmp_path / "models.toml"
    fields: dict[str, Any] = {"aliases": ["n", "a:q"], "presets": {"p": {}}}
    fields |= {"model_path": "org/b", "pinned": True, "group": "g", "memory": "1 MiB"}
    runtime = {"new": with_entry(catalogue_of({}), "new", fields, is_remote=True).models["new"]}
    path.write_text(text)
    reread = read_catalogue(path)
    with pytest.raises(InvalidCatalogue) as caught:
        merge(reread, runtime)
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{path}:{line}: ")
    if field == "models.new":
        assert_sentence("catalogue.taken_at_run_time", caught.value.message, file=path)


# ---------------------------------------------------------------------------------------- pins


def pinned(tmp_path: Path) -> Catalogue:
    path = tmp_path / "models.toml"
    path.write_text(
        "[models]\na = { model_path = 'a', pinned = true }\nb = { model_path = 'b' }\n"
        "c = { model_path = 'c', pinned = true }\n"
    )
    return read_catalogue(path)


def test_pins_that_fit_exactly_are_allowed(tmp_path: Path) -> None:
    need = {"a": {"Host": 60, "CUDA0": 9}, "b": {"Host": 1000}, "c": {"Host": 40}}
    check_pins(pinned(tmp_path), {"Host": 100, "CUDA0": 9, "CUDA1": 0}, need)
    check_pins(pinned(tmp_path), {}, need)
    check_pins(pinned(tmp_path), {"Host": 0}, {})


def test_pins_that_exceed_a_budget_are_refused_with_the_first_that_is_too_much(
    tmp_path: Path,
) -> None:
    need = {"a": {"Host": 60}, "b": {"Host": 1000}, "c": {"CUDA0": 1, "Host": 41}}
    with pytest.raises(InvalidCatalogue) as caught:
        check_pins(pinned(tmp_path), {"Host": 100, "CUDA0": 1}, need)
    assert caught.value.field == "models.c.pinned"
    assert caught.value.message.startswith(f"{tmp_path / 'models.toml'}:4: models.c: ")
    assert "101 MiB of Host" in caught.value.message


def test_a_group_may_have_one_pinned_model_among_others() -> None:
    read = models(a={"group": "g"}, b={"group": "g", "pinned": True}, c={"group": "g"})
    assert [name for name, one in read.models.items() if one.pinned] == ["b"]


def test_memory_of_unlike_forms_is_not_compared() -> None:
    """Which device a plain figure is of, only the machine knows."""
    catalogue("pool.memory = '1 GiB'\n" + PINNED.format("{ CUDA0 = '2 GiB' }"))
    catalogue("pool.memory = { Host = '1 GiB' }\n" + PINNED.format("'2 GiB'"))
    catalogue("pool.memory = 'auto'\n" + PINNED.format("'2 GiB'"))
    catalogue("pool.memory = '1 GiB'\n" + PINNED.format("'1 GiB'"))
    with pytest.raises(InvalidCatalogue):
        catalogue("pool.memory = '1 GiB'\n" + PINNED.format("'2 GiB'"))


PINNED = "models.a = {{ model_path = 'a', pinned = true, memory = {} }}"

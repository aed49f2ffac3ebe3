"""A catalogue as it is meant: its values, defaults, names and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.pool.catalogue import Match, catalogue_of, read_catalogue
from orchestrator.pool.entries import KeyEntry, PoolSettings, Preset
from orchestrator.pool.values import by_device, mib_of, need
from orchestrator.settings.request import LoadRequest
from tests.kit.catalogues import CONTRACT, catalogue, models
from tests.kit.settings import SECRET, repeatable


def test_the_example_of_the_contract_is_read(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(CONTRACT)
    read = read_catalogue(path)
    assert (read.file, list(read.models), list(read.keys)) == (path, ["chat", "elsewhere"], ["ann"])
    assert read.pool == PoolSettings(preload=("chat",), default="chat")
    chat, elsewhere = read.models.values()
    assert chat.request == LoadRequest(
        model_path="org/repo:Q4_K_M", llama_extra_args=(), idle_ttl_s=900, cache_ram_mib=512
    )
    assert (chat.aliases, chat.pinned, chat.weight) == (("gpt-4o-mini",), False, 1.0)
    assert (chat.memory, chat.group, chat.base_url) == (300, "large", None)
    assert [(one.name, one.members) for one in chat.presets] == [("creative", {"temperature": 1.2})]
    assert (elsewhere.request, elsewhere.base_url) == (None, "http://127.0.0.1:9000/v1")
    assert elsewhere.api_key_file == tmp_path / "key"
    assert elsewhere.upstream_model == "name-there"
    assert (elsewhere.kind, elsewhere.pinned) == ("chat", False)
    assert read.keys["ann"] == KeyEntry(name="ann", key_file=tmp_path / "ann.key")


def test_what_is_left_out_has_the_defaults_of_the_contract() -> None:
    pool = catalogue_of({}).pool
    assert (pool.memory, pool.headroom, pool.max_resident) == ("auto", 1024, 0)
    assert (pool.max_wait_s, pool.min_resident_s, pool.held_s) == (30.0, 5.0, 600.0)
    assert (pool.max_waiting, pool.idle_ttl_s, pool.cache_ram_mib) == (256, 900.0, 512)
    assert (pool.preload, pool.default) == ((), None)
    key = catalogue('[keys.ann]\nkey_file = "k"').keys["ann"]
    assert (key.models, key.admin, key.weight) == (None, False, 1.0)
    assert models(theirs={"base_url": "http://h"}).models["theirs"].upstream_model == "theirs"


def test_a_catalogue_may_be_empty() -> None:
    """Its models may come at run time."""
    assert dict(catalogue_of({}).models) == {}
    assert catalogue_of({}).default is None


def test_a_file_and_a_mapping_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(CONTRACT.replace("\n", "\r\n").encode())
    read, given = read_catalogue(path), catalogue(CONTRACT, tmp_path)
    assert (read.pool, read.models, read.keys) == (given.pool, given.models, given.keys)


# ------------------------------------------------------------------------ what the pool gives


def test_a_model_gets_what_its_entry_leaves_out_from_the_pool() -> None:
    read = catalogue("""
        pool = { idle_ttl_s = 60, cache_ram_mib = 64 }
        [models]
        plain = { model_path = "org/a" }
        own = { model_path = "org/a", idle_ttl_s = 5, cache_ram_mib = 0 }
        vectors = { model_path = "org/a", kind = "embedding" }
    """)
    given = {
        name: (one.request.idle_ttl_s, one.request.cache_ram_mib)
        for name, one in read.models.items()
        if one.request is not None
    }
    assert given == {"plain": (60, 64), "own": (5, 0), "vectors": (60, None)}
    assert read.models["vectors"].kind == "embedding"


def test_idle_time_of_zero_unloads_nothing() -> None:
    request = catalogue('pool.idle_ttl_s = 0\nmodels.a.model_path = "org/a"').models["a"].request
    assert request is not None
    assert request.idle_ttl_s is None


def test_no_model_inherits_extra_args() -> None:
    """What a model had before the catalogue was changed must not come back."""
    read = models(plain={}, null={"llama_extra_args": None}, own={"llama_extra_args": ["--mlock"]})
    given = [one.request.llama_extra_args for one in read.models.values() if one.request]
    assert given == [(), (), ("--mlock",)]


# ------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("m.gguf", "{folder}/m.gguf"),
        ("sub/m.gguf", "{folder}/sub/m.gguf"),
        ("./m.gguf", "{folder}/m.gguf"),
        ("../m.gguf", "{folder}/../m.gguf"),
        ("here/model", "{folder}/here/model"),
        ("folder", "{folder}/folder"),
        ("/models/m.gguf", "/models/m.gguf"),
        ("~/m.gguf", "{home}/m.gguf"),
        ("org/repo", "org/repo"),
        ("org/repo:Q4_K_M", "org/repo:Q4_K_M"),
        ("hf://org/repo", "org/repo"),
        ("https://huggingface.co/org/repo/blob/main/m.gguf", "org/repo:m.gguf"),
    ],
)
def test_a_relative_path_starts_in_the_folder_of_the_file(
    written: str, means: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repo has the form of a path too: it is one if nothing of that name is in the folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here" / "model").mkdir(parents=True)
    request = catalogue(f"models.a.model_path = {written!r}", tmp_path).models["a"].request
    assert request is not None
    assert request.model_path == means.format(folder=tmp_path, home=tmp_path / "home")


def test_every_other_file_is_of_the_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    read = catalogue(
        """
        models.a = { model_path = "org/a", mmproj_path = "p.gguf" }
        models.b = { base_url = "http://h", api_key_file = "~/b.key" }
        keys.ann.key_file = "keys/ann"
        """,
        tmp_path,
    )
    request = read.models["a"].request
    assert request is not None
    assert request.mmproj_path == str(tmp_path / "p.gguf")
    assert read.models["b"].api_key_file == Path("/home/ann/b.key")
    assert read.keys["ann"].key_file == tmp_path / "keys" / "ann"


def test_a_path_object_is_a_path() -> None:
    read = catalogue_of({"models": {"a": {"model_path": Path("m.gguf")}}}, "/models")
    request = read.models["a"].request
    assert request is not None
    assert request.model_path == "/models/m.gguf"


# ------------------------------------------------------------------------------------- names

NAMES = """
    [models.chat]
    model_path = "org/a"
    aliases = ["gpt-4o-mini", "org/a:Q4"]
    presets = { creative = { temperature = 1.2 }, strict = {} }
    [models.other]
    base_url = "http://h"
    presets = { strict = { top_k = 1 } }
"""


@pytest.mark.parametrize(
    ("asked", "entry", "preset"),
    [
        ("chat", "chat", None),
        ("gpt-4o-mini", "chat", None),
        ("org/a:Q4", "chat", None),
        ("chat:creative", "chat", "creative"),
        ("gpt-4o-mini:creative", "chat", "creative"),
        ("org/a:Q4:strict", "chat", "strict"),
        ("other:strict", "other", "strict"),
    ],
)
def test_a_model_is_found_by_entry_alias_and_preset(
    asked: str, entry: str, preset: str | None
) -> None:
    match = catalogue(NAMES).find(asked)
    assert match is not None
    assert (match.entry.name, match.preset and match.preset.name) == (entry, preset)


@pytest.mark.parametrize(
    "asked",
    ["", ":", "CHAT", "chat:", ":creative", "org/a", "chat:none", "other:creative", "creative"],
)
def test_any_other_name_is_of_no_model(asked: str) -> None:
    assert catalogue(NAMES).find(asked) is None


def test_a_request_without_a_name_means_the_default_or_the_only_model() -> None:
    assert catalogue(NAMES).default is None
    assert catalogue("pool.default = 'other'" + NAMES).default == catalogue(NAMES).models["other"]
    only = models(a={})
    assert only.default is only.models["a"]


def test_names_in_the_pool_and_in_keys_may_be_aliases_and_become_entries() -> None:
    """Nobody who uses them has to know aliases."""
    read = catalogue(
        """
        pool = { default = "gpt-4o-mini", preload = ["org/a:Q4", "chat"] }
        keys.ann = { key_file = "k", models = ["other", "gpt-4o-mini"] }
        """
        + NAMES
    )
    assert (read.pool.default, read.pool.preload) == ("chat", ("chat",))
    assert read.keys["ann"].models == ("other", "chat")


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("12 GiB", 12288),
        ("300 MiB", 300),
        ("1.5 GiB", 1536),
        ("512 MB", 489),
        ("1 KiB", 1),
        ("1024 KiB", 1),
        ("1025 kB", 1),
        ("2 TiB", 2097152),
        ("1 TB", 953675),
        ("1gib", 1024),
        (" 1   gIb ", 1024),
        ("0 MiB", 0),
        ("0.1 MiB", 1),
    ],
)
def test_a_size_is_rounded_up_to_whole_mib(text: str, mib: int) -> None:
    """Rounded down, the last of several would not fit."""
    assert mib_of("memory", text) == mib


@repeatable
@given(st.integers(0, 10**12 - 1), st.sampled_from("KMGT"), st.booleans())
def test_a_size_is_at_least_what_is_written_and_less_than_a_mib_more(
    number: int, unit: str, is_binary: bool
) -> None:
    size_bytes = number * (1024 if is_binary else 1000) ** (1 + "KMGT".index(unit))
    mib = mib_of("memory", f"{number}{unit}{'i' * is_binary}B")
    assert size_bytes <= mib * 2**20 < size_bytes + 2**20


@pytest.mark.parametrize("value", [12, 1.5, 0, "12", "1.5", " 12 ", "12."])
def test_a_size_without_a_unit_is_refused_with_an_example(value: object) -> None:
    """12 may be meant as GiB, and 12000000000 as bytes."""
    with pytest.raises(
        InvalidRequest, match=r'memory has no unit: write the unit, e\.g\. "12 GiB"'
    ):
        mib_of("memory", value)


@pytest.mark.parametrize(
    "value", ["", "GiB", "12 G", "12 B", "-1 GiB", "1e3 MiB", "1,5 GiB", "٣ GiB", "nan GiB"]
)
def test_other_text_is_not_a_size(value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        mib_of("memory", value)
    assert (caught.value.category, caught.value.field) == ("invalid_request", "memory")


@pytest.mark.parametrize("value", [True, None, [], {}, b"1 GiB"])
def test_other_types_are_not_a_size(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        mib_of("memory", value)
    assert (caught.value.category, caught.value.field) == ("malformed", "memory")


@pytest.mark.parametrize("name", ["a\u202eb", "\U00018d09", "\ud800"])
def test_device_is_printable(name: str) -> None:
    """It is shown, in the budget and in errors."""
    with pytest.raises(InvalidRequest) as caught:
        need("memory", {name: "1 GiB"})
    assert caught.value.message.isprintable()


def test_memory_is_a_size_or_a_table_by_device() -> None:
    read = catalogue("""
        pool.memory = { Host = "12 GiB", CUDA0 = "22 GiB" }
        models.a = { model_path = "org/a", memory = { CUDA0 = "1 GiB" } }
        models.b = { model_path = "org/a", memory = "1 GiB" }
    """)
    assert read.pool.memory == {"Host": 12288, "CUDA0": 22528}
    assert read.models["a"].memory == {"CUDA0": 1024}
    assert read.models["b"].memory == 1024
    assert catalogue('pool.memory = "12 GiB"').pool.memory == 12288
    assert (by_device(read.models["b"].memory), by_device(None)) == ({"": 1024}, {})


# ------------------------------------------------------------------------------ what is kept


READ_ONLY: list[Callable[[Any], object]] = [
    lambda read: read.models.pop("chat"),
    lambda read: read.keys.clear(),
    lambda read: read.pool.memory.update(Host=1),
    lambda read: read.models["chat"].memory.update(Host=1),
    lambda read: setattr(read, "file", None),
    lambda read: setattr(read.models["chat"], "weight", 2.0),
    lambda read: setattr(read.models["chat"].presets[0], "text", "{}"),
]


@pytest.mark.parametrize("change", READ_ONLY, ids=range(len(READ_ONLY)))
def test_a_catalogue_does_not_change(change: Callable[[Any], object]) -> None:
    """Threads share it."""
    read = catalogue("""
        pool.memory = { Host = "12 GiB" }
        [models.chat]
        model_path = "org/a"
        memory = { Host = "1 GiB" }
        presets.a = { temperature = 1 }
    """)
    with pytest.raises((AttributeError, TypeError)):
        change(read)


def test_a_mapping_that_changes_later_changes_nothing() -> None:
    given: dict[str, Any] = {"models": {"a": {"model_path": "org/a", "presets": {"p": {"x": [1]}}}}}
    read = catalogue_of(given)
    given["models"]["a"]["presets"]["p"]["x"].append(2)
    given["models"]["b"] = {}
    (preset,) = read.models["a"].presets
    preset.members["x"].append(3)
    assert (list(read.models), preset.members) == (["a"], {"x": [1]})


def test_a_match_has_the_members_of_the_preset() -> None:
    read = catalogue("""
        [models.a]
        model_path = "org/a"
        [models.a.presets.p]
        stop = ["a", "b"]
        chat_template_kwargs = { enable_thinking = false }
    """)
    assert read.find("a:p") == Match(read.models["a"], read.models["a"].presets[0])
    assert Preset("p", "{}").members == {}
    assert read.models["a"].presets[0].members == {
        "stop": ["a", "b"],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_a_preset_may_be_nested_as_deeply_as_a_request() -> None:
    read = catalogue(f"""
        [models.a]
        model_path = "org/a"
        presets.p.x = {"[" * 64}{"]" * 64}
    """)
    assert read.models["a"].presets[0].text.count("[") == 64


def test_a_token_is_used_and_never_shown() -> None:
    read = models(a={"hf_token": SECRET})
    request = read.models["a"].request
    assert request is not None
    assert request.hf_token == SECRET
    assert SECRET not in repr(read) + str(request.as_dict())

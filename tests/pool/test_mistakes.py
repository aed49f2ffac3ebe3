"""What a catalogue may not have: each mistake has a file, a line and a name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import InvalidCatalogue, MalformedRequest
from orchestrator.pool.catalogue import catalogue_of, read_catalogue
from orchestrator.settings.fields import SETTINGS
from tests.kit.catalogues import CONTRACT, catalogue, mistake
from tests.kit.labels import label
from tests.kit.sentences import assert_sentence
from tests.kit.settings import SECRET

CHAT = '[models.chat]\nmodel_path = "org/a"\n'
THERE = '[models.there]\nbase_url = "http://h"\n'
TWO_DEVICES = """\
pool.memory = { a = '2 GiB', b = '2 GiB' }
[models]
a = { model_path = 'a', pinned = true, memory = { a = '2 GiB', b = '1 GiB' } }
b = { model_path = 'a', pinned = true, memory = { a = '0 MiB', b = '1025 MiB' } }
"""

MISTAKES: list[tuple[str, int, str]] = [
    # unknown keys, everywhere
    ("x = 1", 1, "x"),
    ("[modles.a]", 1, "modles"),
    ("[pool]\nmemroy = 1", 2, "pool.memroy"),
    (CHAT + "wieght = 1", 3, "models.chat.wieght"),
    (THERE + "aliasses = []", 3, "models.there.aliasses"),
    ("[keys.ann]\nkey_file = 'k'\nadmn = true", 3, "keys.ann.admn"),
    ("[keys.ann]\nkey_file = 'k'\nkey = 's3cret'", 3, "keys.ann.key"),
    # tables that are none
    ("pool = 1", 1, "pool"),
    ("[[pool]]", 1, "pool"),
    ("models = []", 1, "models"),
    ("[models]\nchat = 'org/a'", 2, "models.chat"),
    ("[[models.chat]]\nmodel_path = 'org/a'", 1, "models.chat"),
    ("[keys]\nann = 'k'", 2, "keys.ann"),
    (CHAT + "presets = []", 3, "models.chat.presets"),
    (CHAT + "presets.p = 1", 3, "models.chat.presets.p"),
    # spillover
    (CHAT + 'spillover = ["chat"]', 3, "models.chat.spillover"),
    (CHAT + 'spillover = ["nobody"]', 3, "models.chat.spillover"),
    (THERE + "spillover = []", 3, "models.there.spillover"),
    # names
    ('["models"."a b"]\nmodel_path = "org/a"', 1, 'models."a b"'),
    ('[models."-a"]\nmodel_path = "org/a"', 1, "models.-a"),
    ('[models."a:b"]\nmodel_path = "org/a"', 1, 'models."a:b"'),
    (f'[models.{"x" * 65}]\nmodel_path = "org/a"', 1, f'models."{"x" * 64}"'),
    ('[models.""]\nmodel_path = "org/a"', 1, 'models.""'),
    ('[models."ä"]\nmodel_path = "org/a"', 1, 'models."\\u00e4"'),
    ('[models."a\\n"]\nmodel_path = "org/a"', 1, 'models."a\\n"'),
    (CHAT + '[models.chat.presets."a:b"]', 3, 'models.chat.presets."a:b"'),
    ("[keys.'a b']\nkey_file = 'k'", 1, 'keys."a b"'),
    (CHAT + 'aliases = ["a\\u0000"]', 3, "models.chat.aliases"),
    (CHAT + 'aliases = ["\\u202E"]', 3, "models.chat.aliases"),
    (CHAT + 'aliases = [" "]', 3, "models.chat.aliases"),
    (CHAT + 'aliases = "a"', 3, "models.chat.aliases"),
    (CHAT + "aliases = [1]", 3, "models.chat.aliases"),
    # two things of one name
    (CHAT + "aliases = ['chat']", 3, "models.chat.aliases"),
    (CHAT + "aliases = ['a', 'a']", 3, "models.chat.aliases"),
    (CHAT + "aliases = ['there']\n" + THERE, 4, "models.there"),
    (THERE + CHAT + "aliases = ['there']", 5, "models.chat.aliases"),
    (CHAT + "aliases = ['a']\n" + THERE + "aliases = ['a']", 6, "models.there.aliases"),
    (CHAT + "aliases = ['chat:p']\npresets.p = {}", 3, "models.chat.aliases"),
    (CHAT + "presets.p = {}\n" + THERE + "aliases = ['chat:p']", 6, "models.there.aliases"),
    (THERE + "aliases = ['chat:p']\n" + CHAT + "presets.p = {}", 6, "models.chat.presets.p"),
    (
        THERE + "aliases = ['x:p']\n" + CHAT + "aliases = ['x']\npresets.p = {}",
        *(7, "models.chat.presets.p"),
    ),
    (CHAT + CHAT, 3, ""),
    # what belongs together
    ("[models.chat]", 1, "models.chat.model_path"),
    ("[models.chat]\naliases = []", 1, "models.chat.model_path"),
    ("[models.chat]\nmodel_pth = 'org/a'", 2, "models.chat.model_pth"),
    ("[models.chat]\nbase_ur = 'http://h'", 2, "models.chat.base_ur"),
    (CHAT + "base_url = 'http://h'", 2, "models.chat.model_path"),
    (CHAT + "api_key_file = 'k'", 3, "models.chat.api_key_file"),
    (CHAT + "upstream_model = 'm'", 3, "models.chat.upstream_model"),
    (CHAT + "pooling = 'mean'", 3, "models.chat.pooling"),
    (CHAT + "revision = 1", 3, "models.chat.revision"),
    *[(CHAT + f"{name} = true", 3, f"models.chat.{name}") for name in ("on_busy", "prefetch")],
    *[
        (CHAT + f"{name} = true", 3, f"models.chat.{name}")
        for name in ("load_request_id", "force_reload", "restore_previous")
    ],
    *[
        (THERE + f"{name} = 1", 3, f"models.there.{name}")
        for name in SETTINGS
        if name not in {"kind", "model_path"}
    ],
    *[(THERE + f"{name} = '1 GiB'", 3, f"models.there.{name}") for name in ("memory", "group")],
    ("[keys.ann]", 1, "keys.ann.key_file"),
    ("[keys.ann]\nkeyfile = 'k'", 2, "keys.ann.keyfile"),
    ("[keys.ann]\nkey_file = ''", 2, "keys.ann.key_file"),
    # addresses
    *[
        (f"[models.a]\nbase_url = {url!r}", 2, "models.a.base_url")
        for url in (
            *("", "ftp://h", "h:9000", "http://", "http:///v1", "http://h:0", "http://h:x", 1),
            *(
                "http://[",
                "http://ann@h",
                "http://ann:s3cret@h",
                "http://h?key=s3cret",
                "http://h#",
            ),
            *("http://h/a b", "file:///etc/passwd", "http://h\x7f"),
        )
    ],
    # presets
    *[
        (CHAT + f"presets.p = {{ {name} = 'x' }}", 3, f"models.chat.presets.p.{name}")
        for name in ("model", "messages", "prompt", "input", "presets")
    ],
    (CHAT + "[models.chat.presets.p.presets.q]", 3, "models.chat.presets.p.presets"),
    (CHAT + "[models.chat.presets.p]\n\nseed = 1979-05-27", 5, "models.chat.presets.p.seed"),
    (CHAT + "presets.p = { x = [[{ y = 07:32:00 }]] }", 3, "models.chat.presets.p.x"),
    (CHAT + "presets.p = { x = inf }", 3, "models.chat.presets.p.x"),
    (CHAT + f"presets.p.x = {'[' * 65}{']' * 65}", 3, "models.chat.presets.p.x"),
    (CHAT + f"presets.p.x{'.x' * 200} = 1", 3, "models.chat.presets.p.x"),
    (CHAT + "presets.p = { x = { y = nan } }", 3, "models.chat.presets.p.x"),
    # names of nothing
    ("[pool]\npreload = ['chat', 'gone']\n" + CHAT, 2, "pool.preload"),
    ("[pool]\npreload = ['there']\n" + THERE, 2, "pool.preload"),
    ("[pool]\npreload = ['chat:p']\n" + CHAT + "presets.p = {}", 2, "pool.preload"),
    ("[pool]\ndefault = 'gone'\n" + CHAT, 2, "pool.default"),
    ("[pool]\ndefault = 'chat:p'\n" + CHAT + "presets.p = {}", 2, "pool.default"),
    (CHAT + "[keys.ann]\nkey_file = 'k'\nmodels = ['gone']", 5, "keys.ann.models"),
    (CHAT + "[keys.ann]\nkey_file = 'k'\nmodels = []", 5, "keys.ann.models"),
    # pins
    (
        CHAT
        + "pinned = true\ngroup = 'g'\n[models.b]\nmodel_path = 'b'\ngroup = 'g'\npinned = true",
        *(8, "models.b.pinned"),
    ),
    (
        "pool.memory = '1 GiB'\n" + CHAT + "memory = '1025 MiB'\npinned = true",
        *(5, "models.chat.pinned"),
    ),
    (
        TWO_DEVICES,
        *(4, "models.b.pinned"),
    ),
    # syntax
    ("[pool]\nx\n", 2, ""),
    ("[pool]\n\nmemory = '''\n\n", 5, ""),
    ("[pool]\nx = 1\nx = 2", 3, ""),
]

TYPES: dict[str, tuple[str, ...]] = {
    "pool.memory": (
        "1",
        "true",
        "'x'",
        "[]",
        "{}",
        "{ a = 1 }",
        "{ '' = '1 GiB' }",
    ),
    "pool.headroom": ("1", "'auto'", "{ Host = '1 GiB' }", "-1", "'-1 GiB'"),
    "pool.max_resident": ("-1", "1.0", "true", "'1'", "9999999999"),
    "pool.max_waiting": ("-1", "1.0", "inf", f"1{'0' * 400}"),
    "pool.cache_ram_mib": ("-1", "1.0", "true", "'512 MiB'"),
    "pool.preload": ("'chat'", "[1]", "['']", "{}"),
    "pool.default": ("1", "['chat']", "'a\\u0000'"),
    "models.chat.weight": ("0", "-1", "0.0", "nan", "inf", "true", "'1'", f"1{'0' * 400}"),
    "models.chat.memory": ("1", "'auto'", "{}", "[]", "true"),
    "models.chat.group": ("1", "[]"),
    "models.chat.pinned": ("1", "'true'"),
    "models.chat.idle_ttl_s": ("0", "-1", "true", "nan", "inf", "'1'"),
    "models.chat.n_parallel": ("0", "65", "1.0", "true"),
    "models.chat.llama_extra_args": ("'-c 8'", "[1]", "['--port', '1']"),
    "models.chat.kind": ("'chatty'", "1"),
    "keys.ann.key_file": ("1", "true"),
    "keys.ann.models": ("'chat'", "[1]"),
    "keys.ann.admin": ("1", "'true'"),
    "keys.ann.weight": ("0", "-1", "nan"),
    **{
        f"pool.{name}": ("-1", "-0.5", "nan", "inf", "-inf", "true", "'1'", "2592001")
        for name in ("max_wait_s", "min_resident_s", "held_s", "idle_ttl_s")
    },
}
MISTAKES += [
    (f"{key} = {value.replace(chr(39), chr(34))}\n", 1, key)
    for key, values in TYPES.items()
    for value in values
]


@pytest.mark.parametrize(("text", "line", "field"), MISTAKES, ids=label)
def test_a_mistake_has_file_line_and_name(text: str, line: int, field: str, tmp_path: Path) -> None:
    error = mistake(text, tmp_path)
    assert (error.category, error.status, error.field or "") == ("invalid_catalogue", 400, field)
    assert error.message.startswith(f"{tmp_path / 'models.toml'}:{line}: ")
    assert "s3cret" not in error.message
    assert "\n" not in error.message
    assert len(error.message) < 1000


def test_a_mapping_has_no_line() -> None:
    with pytest.raises(InvalidCatalogue) as caught:
        catalogue("[models.chat]\nwieght = 1")
    assert caught.value.field == "models.chat.wieght"
    assert_sentence("catalogue.of_mapping", caught.value.message)


@pytest.mark.parametrize("given", [None, 1, "x", [], [("models", {})]])
def test_only_a_mapping_is_a_catalogue(given: Any) -> None:
    with pytest.raises(InvalidCatalogue, match="a catalogue must be a table, not "):
        catalogue_of(given)


@pytest.mark.parametrize(
    "given",
    [
        {1: {}},
        {"models": {1: {}}},
        {"models": {"a": {1: 2}}},
        {"models": {"a": {"model_path": "a", "presets": {"p": {"x": {1, 2}}}}}},
        {"models": {"a": {"model_path": "a", "presets": {"p": {"x": {b"y": 1}}}}}},
        {"models": {"a": {"model_path": "a", "memory": {1: "1 GiB"}}}},
        {"models": {"a": {"model_path": None}}},
        {"models": {"a": {"base_url": None}}},
        {"pool": None},
    ],
    ids=label,
)
def test_what_only_a_python_mapping_can_hold_is_a_mistake_too(given: Any) -> None:
    with pytest.raises(InvalidCatalogue):
        catalogue_of(given)


def test_the_first_mistake_in_the_file_is_reported(tmp_path: Path) -> None:
    """In whatever order they are found: a list of all would hide it."""
    lines = [
        *("[keys.ann]", "key_file = 'k'", "models = ['gone']"),
        *("[models.chat]", "model_path = 'org/a'", "pinned = 1", "n_parallel = 0", "aliases = [1]"),
        *("[pool]", "max_resident = -1", "default = 'gone'"),
    ]
    expected = ["models.chat.pinned", "models.chat.n_parallel", "models.chat.aliases"]
    expected += ["keys.ann.models", "pool.max_resident", "pool.default"]
    for field in expected:
        error = mistake("\n".join(lines), tmp_path)
        assert error.field == field
        number = int(error.message.removeprefix(f"{tmp_path / 'models.toml'}:").partition(":")[0])
        lines[number - 1] = ""


def test_an_alias_that_cannot_be_read_is_not_a_name_of_nothing(tmp_path: Path) -> None:
    """The other mistake comes first in the file, but is none."""
    text = "[pool]\ndefault = 'a'\n" + CHAT + "aliases = ['a', 1]"
    assert mistake(text, tmp_path).field == "models.chat.aliases"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("catalogue.unknown_key", CHAT + "wieght = 1"),
        ("catalogue.value", CHAT + "n_parallel = 65"),
        ("catalogue.type", CHAT + "pinned = 1"),
        ("catalogue.flag", CHAT + 'llama_extra_args = ["--port", "1"]'),
        ("catalogue.name", '[models."a b"]\nmodel_path = "org/a"'),
        ("catalogue.alias", CHAT + 'aliases = ["a\\u0000"]'),
        ("catalogue.taken", CHAT + THERE + 'aliases = ["chat"]'),
        ("catalogue.taken_by_itself", CHAT + 'aliases = ["chat"]'),
        ("catalogue.no_model", "[models.chat]"),
        ("catalogue.misspelt_address", '[models.chat]\nbase_ur = "http://h"'),
        ("catalogue.two_models", CHAT + 'base_url = "http://h"'),
        ("catalogue.not_ours", CHAT + 'api_key_file = "k"'),
        ("catalogue.not_theirs", THERE + "n_parallel = 1"),
        ("catalogue.decided", CHAT + 'on_busy = "queue"'),
        ("catalogue.base_url", '[models.a]\nbase_url = "http://ann:s3cret@h"'),
        ("catalogue.preset", CHAT + 'presets.p.model = "a"'),
        ("catalogue.preset_of_preset", CHAT + "presets.p.presets = {}"),
        ("catalogue.not_json", CHAT + "presets.p.seed = 1979-05-27"),
        ("catalogue.names_nothing", 'pool.default = "gone"\n' + CHAT),
        ("catalogue.nothing_to_load", 'pool.preload = ["there"]\n' + THERE),
        ("catalogue.no_models_of_key", 'keys.ann = { key_file = "k", models = [] }'),
        ("catalogue.no_key_file", "[keys.ann]"),
        ("catalogue.pins", 'pool.memory = "1 GiB"\n' + CHAT + 'memory = "2 GiB"\npinned = true'),
        (
            "catalogue.pins_of_device",
            'pool.memory = { CUDA0 = "1 GiB" }\n'
            + CHAT
            + ('memory = { CUDA0 = "2 GiB" }\npinned = true'),
        ),
        ("catalogue.syntax", "[pool]\nx\n"),
        ("catalogue.size", "pool.memory = 12"),
    ],
)
def test_a_mistake_is_described_in_one_sentence(key: str, text: str, tmp_path: Path) -> None:
    assert_sentence(key, mistake(text, tmp_path).message, file=tmp_path / "models.toml")


@pytest.mark.parametrize("content", [b"a = '\xff'", b"# \n\n\xc3("])
def test_a_file_must_be_utf8(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidCatalogue) as caught:
        read_catalogue(path)
    line = content.count(b"\n") + 1
    assert caught.value.message == f"{path}:{line}: this is not UTF-8 text"
    assert caught.value.__cause__ is None, "the cause would have the whole text"


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a" + ".a" * 1000 + " = 1"])
def test_a_file_that_is_nested_deeply_is_refused(text: str, tmp_path: Path) -> None:
    assert len(mistake(text, tmp_path).message) < 1000


def test_an_error_of_syntax_is_bounded(tmp_path: Path) -> None:
    assert len(mistake(f"[{'x' * 5000}]\n" * 2, tmp_path).message) < 1000


def test_a_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    assert "digits" in mistake(f"a = {'1' * 5000}", tmp_path).message


@pytest.mark.parametrize("name", ["gone.toml", "folder", "a\x00b"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidCatalogue) as caught:
        read_catalogue(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.field is None


def test_the_folder_of_the_file_is_hidden_from_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A re-read over HTTP answers with the mistake."""
    error = mistake("x = 1", tmp_path)
    assert (str(tmp_path / "models.toml"), "models.toml") in error.problem.names
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidCatalogue, match=r"^models\.toml:1: "):
        read_catalogue("models.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InvalidCatalogue, match=r"^~/models\.toml:1: "):
        read_catalogue("~/models.toml")


def test_no_mistake_shows_a_secret(tmp_path: Path) -> None:
    """Whatever else is wrong in the file, and however the token is written."""
    token = f'hf_token = "{SECRET}"'
    texts = [
        *(token, f"[pool]\n{token}", THERE + token, CHAT + f"{token}\nx = 1"),
        *(CHAT + f"{token}\n{token}", CHAT + token[:-1], CHAT + token.replace('"', "")),
        *(CHAT + f'hf_token = ["{SECRET}"]', CHAT + f'hf_token = "{SECRET}\\u0000"'),
        *(
            f'[keys.ann]\nkey_file = "{SECRET}\\u0000."',
            f'[models.a]\nbase_url = "http://{SECRET}@h"',
        ),
        CHAT + f"hf_token = {{ a = '{SECRET}' }}",
        CHAT + f'llama_extra_args = ["--api-key={SECRET}"]',
    ]
    for text in texts:
        error = mistake(text, tmp_path)
        seen: BaseException | None = error
        while seen is not None:
            assert SECRET not in str(seen) + repr(seen), text
            seen = seen.__cause__


def test_the_original_error_is_the_cause(tmp_path: Path) -> None:
    """For a caller that tells a wrong type from a wrong value."""
    assert isinstance(mistake(CHAT + "x = 1", tmp_path).__cause__, MalformedRequest)


def test_any_line_of_the_example_may_be_missing(tmp_path: Path) -> None:
    """Then it is read, or the mistake is at a line of the file."""
    lines = CONTRACT.splitlines()
    for number in range(len(lines)):
        path = tmp_path / "models.toml"
        path.write_text("\n".join(lines[:number] + lines[number + 1 :]))
        with contextlib.suppress(InvalidCatalogue):
            try:
                read_catalogue(path)
            except InvalidCatalogue as error:
                place = error.message.removeprefix(f"{os.fspath(path)}:").partition(":")[0]
                assert 1 <= int(place) < len(lines)
                raise

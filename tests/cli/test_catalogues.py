"""`models init` and `models check`: a catalogue before it is served."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli.catalogues import drafts_of
from orchestrator.cli.drafts import Draft, toml_text, unique_name
from orchestrator.models.on_disk import ModelOnDisk
from orchestrator.pool.catalogue import read_catalogue
from tests.kit.command import Cli
from tests.kit.sentences import assert_sentence
from tests.kit.sparse_model import transformer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Models = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def models(cli: Cli, state_dir: Path, cache: Path) -> Models:
    """Run a command of `models` with the embedded server and this test's own folders."""

    def run(command: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        place = ("--state-dir", str(state_dir), "--llama-server", "embedded")
        return cli("models", command, *args, *place, **{"HF_HUB_CACHE": str(cache), **env})

    return run


@pytest.fixture
def cache(tmp_path: Path, tiny_model: str) -> Path:
    """A cache with two variants of one repo and a repo of another owner."""
    top = tmp_path / "hub"
    for folder, names in (
        ("models--org--Tiny-GGUF", ("Tiny-Q4_K_M.gguf", "Tiny-Q8_0.gguf")),
        ("models--other--tiny", ("tiny-Q8_0.gguf",)),
    ):
        files = top / folder / "snapshots" / COMMIT
        files.mkdir(parents=True)
        (top / folder / "refs").mkdir()
        (top / folder / "refs" / "main").write_text(COMMIT)
        for name in names:
            shutil.copy(tiny_model, files / name)
    return top


def test_init_writes_a_catalogue_of_what_is_on_disk_that_can_be_read_and_checked(
    models: Models, tmp_path: Path, tiny_model: str
) -> None:
    """With the memory that each needs in a comment."""
    folder, file = tmp_path / "my models", tmp_path / "models.toml"
    folder.mkdir()
    one = shutil.copy(tiny_model, folder / "-über 1.gguf")
    args = (str(file), "--models-dir", str(folder), "--json")
    env = {"HF_HUB_OFFLINE": "1"}
    made = json.loads(models("init", *args, **env).stdout)
    read = read_catalogue(file).models
    paths = {name: entry.request and entry.request.model_path for name, entry in read.items()}
    assert paths == {
        "Tiny-Q4_K_M": "org/Tiny-GGUF:Q4_K_M",
        "Tiny-Q8_0": "org/Tiny-GGUF:Q8_0",
        "tiny": "other/tiny:Q8_0",
        "ber-1": str(one),
    }
    assert [(m["name"], m["model_path"]) for m in made["models"]] == list(paths.items())
    need = made["models"][0]["memory"]
    assert need["source"] == "estimate"
    assert need["mib"] > 512  # the pool's cache of prompts is counted
    assert f"memory: {need['mib']:.1f} MiB (estimate)" in file.read_text()
    checked = models("check", str(file), "--models-dir", str(folder), **env)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"{file} can be served" in checked.stdout


def test_init_overwrites_only_by_force(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text("mine")
    refused = models("init", str(file))
    assert (refused.returncode, file.read_text()) == (1, "mine")
    assert_sentence("cli.init.exists", refused.stderr.splitlines()[1].strip(), file=file)
    assert models("init", str(file), "--force", HF_HUB_OFFLINE="1").returncode == 0
    assert len(read_catalogue(file).models) == 3


def test_init_says_where_models_come_from_when_there_are_none(
    models: Models, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    done = models("init", str(file), HF_HUB_CACHE=str(tmp_path / "nowhere"))
    assert (done.returncode, file.exists()) == (1, False)
    assert_sentence("cli.init.none", done.stderr.splitlines()[1].strip())


def test_init_says_why_a_need_is_not_known(models: Models, tmp_path: Path, cache: Path) -> None:
    """A broken file must not keep the others out of the catalogue."""
    broken = cache / "models--other--tiny" / "snapshots" / COMMIT / "tiny-Q8_0.gguf"
    broken.write_bytes(b"no model")
    file = tmp_path / "models.toml"
    made = json.loads(models("init", str(file), "--json", HF_HUB_OFFLINE="1").stdout)
    assert [m["memory"] is None for m in made["models"]] == [False, False, True]
    assert "memory: not known: " in file.read_text()
    assert len(read_catalogue(file).models) == 3


def test_check_names_what_never_fits_with_its_place(
    models: Models, tmp_path: Path, tiny_model: str
) -> None:
    """Alone, and pinned together; what the server can fit by a smaller context is no problem."""
    file = tmp_path / "models.toml"
    file.write_text(f"""\
[pool]
memory = {{ Host = "600 MiB" }}
cache_ram_mib = 0

[models.small]
model_path = "{tiny_model}"
pinned = true

[models.declared]
model_path = "{tiny_model}"
memory = "601 MiB"

[models.cached]
model_path = "{tiny_model}"
cache_ram_mib = 700

[models.pinned]
model_path = "{tiny_model}"
pinned = true
cache_ram_mib = 590

[models.elsewhere]
base_url = "http://127.0.0.1:9/v1"
""")
    done = models("check", str(file), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["budget"]["Host"] == 600
    assert {one["name"]: one["verdict"] for one in found["models"]} == {
        "small": "fits",
        "declared": "never fits",
        "cached": "never fits",
        "pinned": "fits",
        "elsewhere": "served elsewhere",
    }
    problems = [(p["category"], p["field"]) for p in found["problems"]]
    assert problems == [
        ("too_large", "models.declared"),
        ("too_large", "models.cached"),
        ("invalid_catalogue", "models.pinned.pinned"),
    ]
    assert_sentence("cli.check.too_large", found["problems"][0]["detail"], file=file)
    assert found["problems"][2]["detail"].startswith(f"{file}:19: models.pinned: with it")
    human = models("check", str(file))
    assert human.returncode == 1
    assert f"{file}:9: models.declared: it needs 601 MiB of Host" in human.stderr


def test_check_allows_a_context_that_the_server_reduces(models: Models, tmp_path: Path) -> None:
    path = transformer(tmp_path / "long.gguf", trained=131072)
    file = tmp_path / "models.toml"
    text = f"""\
pool = {{ memory = {{ Host = "500 MiB" }}, cache_ram_mib = 0 }}
[models.one]
model_path = "{path}"
"""
    file.write_text(text)
    (found,) = json.loads(models("check", str(file), "--json").stdout)["models"]
    assert found["verdict"] == "fits with a smaller context"
    file.write_text(f"{text}max_seq_length = 131072\n")
    (found,) = json.loads(models("check", str(file), "--json").stdout)["models"]
    assert found["verdict"] == "never fits"


def test_check_names_the_place_of_a_mistake_and_of_a_model_that_is_not_there(
    models: Models, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models.one]\nmodel_path = "gone.gguf"\n')
    done = models("check", str(file), "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert (done.returncode, problem["field"]) == (1, "models.one.model_path")
    assert problem["detail"].startswith(f"{file}:2: models.one: ")
    file.write_text('[models.one]\nmodel_path = "gone.gguf"\nwieght = 2\n')
    done = models("check", str(file), "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert (done.returncode, problem["category"]) == (1, "invalid_catalogue")
    assert (
        problem["detail"] == f"{file}:3: models.one: unknown field 'wieght': did you mean weight?"
    )


def test_check_reads_the_files_of_the_keys(models: Models, tmp_path: Path, tiny_model: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text(f'[models.one]\nmodel_path = "{tiny_model}"\n[keys.ann]\nkey_file = "k"\n')
    done = models("check", str(file), "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert (done.returncode, problem["field"]) == (1, "keys.ann.key_file")
    (tmp_path / "k").write_text("a-key")
    assert models("check", str(file), "--json").returncode == 0


def test_check_of_a_model_that_only_the_hub_knows_is_no_problem_while_it_is_away(
    models: Models, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models.one]\nmodel_path = "org/elsewhere"\n')
    done = models("check", str(file), "--json", HF_ENDPOINT="http://127.0.0.1:9")
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"]) == (0, [])
    assert report["models"][0]["verdict"] == "not known"


@pytest.mark.parametrize(
    ("wanted", "taken", "name"),
    [
        ("Qwen3-0.6B", (), "Qwen3-0.6B"),
        ("a b/c", (), "a-b-c"),
        ("_.x.", (), "x"),
        ("日本", (), "model"),
        ("x", ("x", "x-2"), "x-3"),
        ("y" * 70, ("y" * 64,), "y" * 62 + "-2"),
    ],
)
def test_a_name_is_valid_and_not_taken(wanted: str, taken: tuple[str, ...], name: str) -> None:
    assert unique_name(wanted, taken) == name


def test_a_split_model_is_named_without_the_number_of_its_part() -> None:
    path = "/m/Big-Q4_K_M-00001-of-00002.gguf"
    assert [one.name for one in drafts_of([ModelOnDisk(path, "folder", 1, 0.0)])] == ["Big-Q4_K_M"]


def test_what_is_written_as_toml_is_read_back() -> None:
    """Strings with every kind of character, tables in tables, and comments of one line."""
    members = {
        "model_path": 'a"\\\n\x7f\t\U0001f600é',
        "llama_extra_args": ["--seed", "1"],
        "pinned": True,
        "weight": 1.5,
        "presets": {"hot.er": {"temperature": 1, "a b": {"é": [{"x": 1}]}}},
        "memory": {"Host": "1 GiB"},
    }
    text = toml_text([Draft("a.b", members, ["two\nlines"])], ["\x1b[31m"])
    assert tomllib.loads(text)["models"] == {"a.b": members}
    assert "# two\\nlines\n" in text

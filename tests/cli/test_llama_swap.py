"""`models import llama-swap`: what becomes of each key of its configuration."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.llama_swap import Converted, convert
from orchestrator.cli.server_command import read_command
from orchestrator.pool.catalogue import catalogue_of, read_catalogue
from orchestrator.pool.places import dotted
from tests.kit.command import Cli, environment
from tests.kit.sentences import assert_sentence

CONFIG = """\
globalTTL: 300
apiKeys: [sk-secret]
macros:
  ctx: 4096
  server: >
    /opt/llama-server
    --port ${PORT}
models:
  "qwen/3:0.6b":
    cmd: |
      # the small one
      ${server} -m qwen.gguf -ngl 99 \\
      --ctx-size ${ctx} --log-file /tmp/log
    ttl: 60
  elsewhere:
    cmd: vllm serve org/model
"""

SURROGATE = """\
models:
  a:
    cmd: llama-server -m a.gguf
    filters: {setParamsByID: {"a:x": {stop: "\\ud800"}}}
"""


def converted(models: Mapping[str, Any], **more: Any) -> Converted:
    """Return what becomes of a configuration, which must be a catalogue."""
    made = convert({"models": models, **more}, {"HOME": "/home/ann"}, None)
    tables = {name: draft.members for name, draft in made.drafts.items()}
    catalogue_of({"pool": made.pool, "models": tables})
    return made


def members(command: str, **more: Any) -> dict[str, Any]:
    """Return the entry of one command."""
    return converted({"one": {"cmd": command, **more}}).drafts["one"].members


def places(made: Converted) -> list[str]:
    return [dotted(path) for path, _ in made.remarks]


def test_import_writes_a_catalogue_and_says_where_what_is_left_out_stands(
    cli: Cli, tmp_path: Path
) -> None:
    config, file = tmp_path / "config.yaml", tmp_path / "models.toml"
    config.write_text(CONFIG)
    done = cli("models", "import", "llama-swap", str(config), str(file), "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    catalogue = read_catalogue(file)
    (entry,) = catalogue.models.values()
    assert (entry.name, entry.aliases) == ("qwen-3-0.6b", ("qwen/3:0.6b",))
    request = entry.request
    assert request is not None
    assert request.model_path == str(tmp_path / "qwen.gguf")
    assert (request.max_seq_length, request.llama_extra_args) == (4096, ("-ngl", "99"))
    assert (request.idle_ttl_s, catalogue.pool.idle_ttl_s) == (60, 300)
    found = [(one["place"], one["line"]) for one in report["not_carried_over"]]
    assert found == [
        ('models."qwen/3:0.6b".cmd', 10),
        ("models.elsewhere.cmd", 16),
        ("groups", None),
        ("apiKeys", 2),
    ]
    assert report["llama_server"] == ["/opt/llama-server"]
    assert "--log-file is refused" in file.read_text()
    assert "sk-secret" not in file.read_text() + done.stdout
    human = cli("models", "import", "llama-swap", str(config), str(file), "--force").stdout
    assert f"{config}:16: models.elsewhere.cmd: this starts no llama-server" in human
    assert f"{file}: 1 model " in human


def test_import_overwrites_only_by_force(cli: Cli, tmp_path: Path) -> None:
    config, file = tmp_path / "config.yaml", tmp_path / "models.toml"
    config.write_text(CONFIG)
    file.write_text("mine")
    refused = cli("models", "import", "llama-swap", str(config), str(file))
    assert (refused.returncode, file.read_text()) == (1, "mine")
    assert_sentence("cli.init.exists", refused.stderr.splitlines()[1].strip(), file=file)
    assert cli("models", "import", "llama-swap", str(config), str(file), "--force").returncode == 0
    assert len(read_catalogue(file).models) == 1


def test_relative_paths_mean_the_same_in_a_catalogue_elsewhere(cli: Cli, tmp_path: Path) -> None:
    config, file = tmp_path / "config.yaml", tmp_path / "deep" / "models.toml"
    file.parent.mkdir()
    config.write_text(CONFIG)
    assert cli("models", "import", "llama-swap", str(config), str(file)).returncode == 0
    request = read_catalogue(file).models["qwen-3-0.6b"].request
    assert request is not None
    assert request.model_path == str(tmp_path / "qwen.gguf")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("models: [1]", "cli.import.no_models"),
        ("just words", "cli.import.no_models"),
        ("", "cli.import.no_models"),
        ("models:\n  a: [", "cli.import.no_yaml"),
        ("models: !!python/object:os.system {}", "cli.import.unknown_tag"),
        (SURROGATE, "cli.import.surrogate"),
    ],
)
def test_what_is_no_configuration_is_refused(cli: Cli, tmp_path: Path, text: str, key: str) -> None:
    config, file = tmp_path / "config.yaml", tmp_path / "models.toml"
    config.write_text(text)
    done = cli("models", "import", "llama-swap", str(config), str(file))
    assert (done.returncode, file.exists()) == (1, False)
    assert_sentence(key, done.stderr.splitlines()[1].strip(), config=config)


def test_a_missing_reader_names_its_extra(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(name='yaml')\n")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    done = cli("models", "import", "llama-swap", str(config), PYTHONPATH=path)
    assert done.returncode == 1
    assert_sentence("cli.import.no_reader", done.stderr.splitlines()[1].strip())


def test_a_missing_file_and_an_unwritable_one_are_named(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    gone = cli("models", "import", "llama-swap", str(config), str(tmp_path / "models.toml"))
    assert (gone.returncode, f"{config} cannot be read" in gone.stderr) == (1, True)
    config.write_text(CONFIG)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    file = tmp_path / "no folder" / "models.toml"
    done = cli("models", "import", "llama-swap", str(config), str(file))
    assert (done.returncode, f"{file} cannot be written" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("-m a.gguf", {"model_path": "a.gguf"}),
        ("--model a.gguf -c 0", {"model_path": "a.gguf"}),
        ("-hf org/a:Q4_K_M", {"model_path": "org/a:Q4_K_M"}),
        (
            "--hf-repo org/a --hf-file a-Q8_0.gguf",
            {"model_path": "org/a", "gguf_variant": "a-Q8_0.gguf"},
        ),
        ("-m a.gguf -c 8192", {"max_seq_length": 8192}),
        ("-m a.gguf --ctx_size=512 -c 1024", {"max_seq_length": 1024}),
        ("-m a.gguf --mmproj p.gguf -np 4", {"mmproj_path": "p.gguf", "n_parallel": 4}),
        ("-m a.gguf -ctk q8_0 --cache-type-v q8_0", {"cache_type_kv": "q8_0"}),
        (
            "-m a.gguf -ctk q8_0 -ctv q4_0",
            {"llama_extra_args": ["-ctk", "q8_0", "-ctv", "q4_0"]},
        ),
        ("-m a.gguf -ctk q8_0", {"llama_extra_args": ["-ctk", "q8_0"]}),
        ("-m a.gguf --cache-ram 0", {"cache_ram_mib": 0}),
        ("-m a.gguf --embedding --pooling cls", {"kind": "embedding", "pooling": "cls"}),
        ("-m a.gguf --embeddings --reranking", {"kind": "rerank"}),
        (
            "-m a.gguf -ngl 99 --temp -1 --jinja --no-mmap",
            {"llama_extra_args": ["-ngl", "99", "--temp", "-1", "--jinja", "--no-mmap"]},
        ),
    ],
)
def test_flags_that_are_fields_become_fields_and_all_others_stay(
    flags: str, fields: dict[str, Any]
) -> None:
    """Nothing else is in the entry, and nothing is remarked."""
    made = converted({"one": {"cmd": f"llama-server --port ${{PORT}} {flags}"}}, groups={"g": {}})
    assert {"model_path": "a.gguf", **fields} == made.drafts["one"].members
    assert [why for path, why in made.remarks if path[0] == "models"] == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--host 0.0.0.0", "--host is refused"),
        ("--api-key hush", "--api-key is refused"),
        ("-hft hush", "-hft is not written to a file"),
        ("--mmproj-url https://x/p.gguf", "--mmproj-url: a projector is a file here"),
        ("-np 100", "-np: n_parallel is 100: it must be between 1 and 64"),
        ("-c many", "-c: 'many' is no number"),
        ("--no-webui", "--no-webui is refused"),
        ("--pooling mean", "pooling"),
    ],
)
def test_flags_that_cannot_be_carried_over_are_named_without_a_secret(flags: str, why: str) -> None:
    made = converted({"one": {"cmd": f"llama-server -m a.gguf {flags} --seed 1"}})
    assert made.drafts["one"].members == {
        "model_path": "a.gguf",
        "llama_extra_args": ["--seed", "1"],
    }
    (remark,) = [text for path, text in made.remarks if path[0] == "models"]
    assert why in remark
    assert "hush" not in remark


def test_a_wrapper_of_the_server_is_named() -> None:
    made = converted({"one": {"cmd": "numactl -N 0 /x/llama-server-b1 -m a.gguf"}})
    assert made.programs == ["/x/llama-server-b1"]
    assert "numactl -N 0 in front of the server" in made.remarks[0][1]


@pytest.mark.parametrize(
    "command",
    [
        "docker run --name llama-server image -m a.gguf",
        "bash -c 'llama-server -m a.gguf'",
        "llama-server --port ${PORT}",
        "llama-server -m a.gguf --metrics-port ${PORT}1",
        "llama-server -m ${env.GONE}/a.gguf",
        "llama-server -m ${loop}",
        "llama-server -m 'a.gguf",
        "",
        None,
    ],
)
def test_a_model_that_cannot_be_started_here_is_left_out_with_a_reason(command: str | None) -> None:
    one = {"cmd": command, "macros": {"loop": "${loop}x"}}
    made = converted({"one": one, "two": {"cmd": "llama-server -m b.gguf"}})
    assert list(made.drafts) == ["two"]
    assert places(made)[0] == "models.one.cmd"
    assert "not in the catalogue" in made.remarks[0][1]


def test_macros_are_replaced_in_each_other_and_from_the_environment() -> None:
    macros = {"dir": "${env.HOME}/models", "file": "${dir}/${MODEL_ID}.gguf", "n": 5, "on": True}
    own = {"n": 7, "seed": "--seed ${n} --x ${on}"}
    made = converted(
        {"one": {"cmd": "llama-server -m ${file} ${seed}", "macros": own}}, macros=macros
    )
    assert made.drafts["one"].members == {
        "model_path": "/home/ann/models/one.gguf",
        "llama_extra_args": ["--seed", "7", "--x", "true"],
    }


def test_idle_times_mean_the_same() -> None:
    """A model without one has that of all, and 0 is never."""
    command = {"cmd": "llama-server -m a.gguf"}
    never = converted({"one": command})
    assert (never.pool["idle_ttl_s"], "idle_ttl_s" in never.drafts["one"].members) == (0, False)
    models = {"one": {**command, "ttl": 0}, "two": command, "three": {**command, "ttl": 60}}
    made = converted(models, globalTTL=300)
    assert made.pool["idle_ttl_s"] == 0
    times = [draft.members.get("idle_ttl_s") for draft in made.drafts.values()]
    assert times == [None, 300, 60]


def test_groups_and_preloads_are_carried_over_by_name() -> None:
    command = {"cmd": "llama-server -m a.gguf"}
    groups = {
        "swapping": {"members": ["a b", "two", "gone"], "persistent": True},
        "always": {"members": ["three"], "swap": False, "persistent": True, "exclusive": False},
    }
    made = converted(
        {"a b": command, "two": command, "three": command},
        groups=groups,
        hooks={"on_startup": {"preload": ["a b", "gone"]}},
    )
    shared = {name: draft.members for name, draft in made.drafts.items()}
    assert [shared[name].get("group") for name in ("a-b", "two", "three")] == ["swapping"] * 2 + [
        None
    ]
    assert shared["three"]["pinned"] is True
    assert made.pool["preload"] == ["a-b"]
    assert places(made) == [
        "groups.swapping.members",
        "groups.swapping.persistent",
        "groups.swapping",
        "hooks.on_startup.preload",
    ]


def test_parameters_by_name_become_presets() -> None:
    by_name = {
        "${MODEL_ID}:high": {"temperature": "${hot}"},
        "other": {"temperature": 1},
        "one:bad": {"model": "x"},
        "one:null": {"stop": [None]},
    }
    made = converted(
        {
            "one": {
                "cmd": "llama-server -m a.gguf",
                "macros": {"hot": 1.5},
                "filters": {"setParamsByID": by_name, "setParams": {"top_k": 1}},
            }
        }
    )
    assert made.drafts["one"].members["presets"] == {"high": {"temperature": 1.5}}
    assert places(made)[:5] == [
        "models.one.filters.setParams",
        'models.one.filters.setParamsByID."${MODEL_ID}:high"',
        "models.one.filters.setParamsByID.other",
        'models.one.filters.setParamsByID."one:bad"',
        'models.one.filters.setParamsByID."one:null"',
    ]


def test_peers_become_entries_of_another_server() -> None:
    peers = {
        "router": {"proxy": "https://x.example/api/", "apiKey": "hush", "models": ["org/m", "one"]},
        "odd": {"proxy": "ftp://x", "models": ["two"]},
    }
    made = converted({"one": {"cmd": "llama-server -m a.gguf"}}, peers=peers)
    assert made.drafts["org-m"].members == {
        "base_url": "https://x.example/api/v1",
        "aliases": ["org/m"],
        "upstream_model": "org/m",
    }
    assert list(made.drafts) == ["one", "org-m"]
    assert places(made) == [
        "peers.router.models",
        "peers.router.apiKey",
        "models.two",
        "groups",
    ]


def test_every_other_key_is_named_unless_it_says_what_holds_anyway() -> None:
    one = {
        "cmd": "llama-server -m a.gguf",
        "proxy": "http://127.0.0.1:${PORT}",
        "checkEndpoint": "/health",
        "unlisted": False,
        "env": ["TOKEN=hush", "CUDA_VISIBLE_DEVICES=0"],
        "metadata": {"x": 1},
        "brandNew": 1,
    }
    made = converted(
        {"one": one, "two": {**one, "proxy": "http://h:1"}}, logLevel="info", startPort=1
    )
    keys = ["env", "metadata", "brandNew"]
    assert places(made) == [
        *(f"models.one.{key}" for key in keys),
        *(f"models.two.{key}" for key in ("env", "proxy", *keys[1:])),
        "groups",
        "logLevel",
    ]
    assert "set TOKEN, CUDA_VISIBLE_DEVICES where you serve" in made.remarks[0][1]


def test_a_command_of_another_program_is_none() -> None:
    assert read_command(["vllm", "serve", "org/m"]) is None
    assert read_command([]) is None

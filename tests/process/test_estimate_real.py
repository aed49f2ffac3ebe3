"""Estimates, compared with what the real llama-server says that it needs, before it reads a weight.

The models are holes but for their headers, or small.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from orchestrator.models.estimate import Estimate, estimate, files_of
from orchestrator.models.local import identity_of
from orchestrator.settings.argv import build_argv
from orchestrator.settings.files import FileIdentity, ModelFiles
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ServerBinary, Target
from tests.kit.sparse_model import latent, recurrent, transformer

pytestmark = pytest.mark.external

REQUESTS: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "short": {"max_seq_length": 2048},
    "long": {"max_seq_length": 32768},
    "not a multiple": {"max_seq_length": 3000, "n_parallel": 3},
    "tiny": {"max_seq_length": 100},
    "one slot": {"n_parallel": 1},
    "eight slots": {"n_parallel": 8, "max_seq_length": 8192},
    "unified": {"n_parallel": 6, "llama_extra_args": ["-kvu"]},
    "by flag": {"max_seq_length": 512, "llama_extra_args": ["-c", "16384"]},
    "q8_0": {"cache_type_kv": "q8_0", "max_seq_length": 8192},
    "q4_0": {"cache_type_kv": "q4_0", "n_parallel": 2, "max_seq_length": 8192},
    "f32": {"cache_type_kv": "f32", "max_seq_length": 8192},
    "iq4_nl": {"cache_type_kv": "iq4_nl"},
    "two types": {"llama_extra_args": ["-ctk", "q8_0", "--cache-type-v", "q5_1"]},
    "wide": {"llama_extra_args": ["-ub", "1024"]},
    "narrow": {"llama_extra_args": ["-ub", "64", "-b", "256"]},
    "narrow batch": {"llama_extra_args": ["-b", "128"]},
    "no flash": {"llama_extra_args": ["-fa", "off"], "max_seq_length": 4096},
    "no flash, slots": {
        "llama_extra_args": ["-fa", "off"],
        "n_parallel": 4,
        "max_seq_length": 8192,
    },
    "embedding": {"kind": "embedding"},
    "wide embedding": {"kind": "embedding", "llama_extra_args": ["-ub", "1024"]},
    "rerank": {"kind": "rerank", "n_parallel": 2, "max_seq_length": 4096},
    "drafting": {"speculative_type": "ngram-mod"},
}


class Need(NamedTuple):
    """In MiB."""

    total: int
    model: int
    context: int
    compute: int


PARTS: Final = ("self", "model", "context", "compute")
RECORD: Final = b'{"type":"fit_memory_breakdown"'


def need(record: bytes) -> Need:
    rows = json.loads(record)["data"]["rows"]
    return Need(*(sum(row[part] for row in rows) for part in PARTS))


@dataclass
class Server:
    """The real one, asked only for what it needs."""

    path: str

    def target(self, model: Path, **fields: Any) -> Target:
        server = ServerBinary("external", (self.path,), FileIdentity(self.path, 0, 0, 0, 0))
        request = LoadRequest.from_dict({"model_path": str(model), **fields})
        return Target(request, ModelFiles((identity_of(model),)), server)

    def needs(self, target: Target, records: int = 1) -> list[Need]:
        """Return the server's first records; it is killed once they are there."""
        argv = [*build_argv(target, template_file=None), "--log-jsonl"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            lines = (line for line in process.stdout if line.startswith(RECORD))
            try:
                found = [need(line) for line in islice(lines, records)]
            finally:
                process.kill()
        assert len(found) == records, argv
        return found

    def compare(self, model: Path, **fields: Any) -> None:
        target = self.target(model, **fields)
        check(estimate(target, files_of(target)), self.needs(target)[0])


def check(found: Estimate, real: Need) -> None:
    """Assert that an estimate is hardly ever too low, and not much too high, in all and by part.
    The server rounds each figure down.
    """
    told = (found, real)
    assert found.server_mib >= real.total - max(0.05 * real.total, 16), told
    assert found.server_mib <= real.total + max(0.1 * real.total, 32), told
    assert real.model <= found.weights_mib <= real.model + 4, told
    assert real.context <= found.context_mib <= real.context + 2, told
    assert found.compute_mib >= real.compute, told


@pytest.fixture
def server(llama_server: str) -> Server:
    return Server(llama_server)


@pytest.mark.real
@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS.keys())
def test_an_estimate_of_a_real_model_is_what_the_server_needs(
    server: Server, smollm2: str, fields: dict[str, Any]
) -> None:
    server.compare(Path(smollm2), **fields)


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS.keys())
def test_an_estimate_of_the_tiny_model_is_what_the_server_needs(
    server: Server, tiny_model: str, fields: dict[str, Any]
) -> None:
    server.compare(Path(tiny_model), **fields)


SHAPES: Final[dict[str, Callable[[Path], Path]]] = {
    "small": transformer,
    "8B": lambda path: transformer(
        path, layers=2, width=4096, inner=14336, heads=32, kv_heads=8, key=128, trained=32768
    ),
    "experts": lambda path: transformer(
        path, width=2048, inner=768, heads=32, key=128, experts=32, used=8
    ),
    "tied": lambda path: transformer(path, n_vocab=100_000, is_tied=True),
    "large vocabulary": lambda path: transformer(path, n_vocab=150_000, kind="Q6_K"),
    "windows": lambda path: transformer(
        path, "gemma3", layers=12, trained=32768, more={"attention.sliding_window": 1024}
    ),
    "recurrent": recurrent,
    "latent": latent,
}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"n_parallel": 4, "max_seq_length": 16384}, id="slots"),
        pytest.param({"llama_extra_args": ["-ub", "1024", "--swa-full"]}, id="wide"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_estimates_hold_for_every_shape(
    server: Server, tmp_path: Path, shape: Callable[[Path], Path], fields: dict[str, Any]
) -> None:
    server.compare(shape(tmp_path / "model.gguf"), **fields)


def test_each_slot_has_the_whole_context_where_both_are_not_named(
    server: Server, tmp_path: Path
) -> None:
    """The server's first record is too small then: it divides the context. The one after loading,
    which this compares with, does not.
    """
    target = server.target(transformer(tmp_path / "model.gguf"), n_parallel=4)
    first, loaded = server.needs(target, records=2)
    assert first.context * 4 == loaded.context
    check(estimate(target, files_of(target)), loaded)


@pytest.mark.parametrize(
    "flags", [(), ("-ctkd", "q8_0", "--cache-type-v-draft", "q4_0")], ids=["plain", "quantised"]
)
def test_a_draft_model_is_estimated_with_its_own_cache(
    server: Server, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    draft = transformer(tmp_path / "draft.gguf", layers=8, width=512, heads=8, inner=1024)
    fields = {"max_seq_length": 16384, "llama_extra_args": ["-md", str(draft), *flags]}
    target = server.target(transformer(tmp_path / "model.gguf"), **fields)
    main, drafting = server.needs(target, records=2)
    assert drafting.context > 32
    both = Need(*(one + other for one, other in zip(main, drafting, strict=True)))
    check(estimate(target, files_of(target)), both)

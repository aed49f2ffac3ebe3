"""Catalogues for tests: written as TOML, read from a file or as a mapping."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from orchestrator.errors import InvalidCatalogue
from orchestrator.pool.catalogue import Catalogue, catalogue_of, read_catalogue

ROOT: Final = Path(__file__).parents[2]
CONTRACT: Final = """\
[pool]
memory = "auto"          # or "12 GiB", or { Host = "12 GiB", CUDA0 = "22 GiB" }
headroom = "1 GiB"       # of "auto": what stays free on each device
max_resident = 0         # 0 = as many as fit
max_wait_s = 30          # how long traffic on residents may keep another model's requests waiting
min_resident_s = 5       # what has just been loaded stays at least so long
max_waiting = 256        # requests that may wait, of all models
held_s = 600             # how long one waits at most, then 503 with Retry-After
idle_ttl_s = 900         # default of the models
cache_ram_mib = 512      # default of the chat models; other kinds have none
preload = ["chat"]       # loaded at the start, in this order; what does not fit is skipped with a warning
default = "chat"         # for requests that name no model

[models.chat]
model_path = "org/repo:Q4_K_M"   # and any other field of section 1
aliases = ["gpt-4o-mini"]
pinned = false
weight = 1.0             # of two models that wait, the larger weight × wait goes first
memory = "300 MiB"       # declared instead of asked; a table by device too
group = "large"          # of a group at most one is resident
[models.chat.presets.creative]   # called "chat:creative": the same server, other defaults of a request
temperature = 1.2

[models.elsewhere]
base_url = "http://127.0.0.1:9000/v1"   # any OpenAI-compatible server: passed on, watched, never started or stopped
api_key_file = "key"
upstream_model = "name-there"           # default: the entry's name

[keys.ann]
key_file = "ann.key"     # models = [...] (none = all), admin = false, weight = 1.0
"""  # noqa: E501, RUF001
"""The example of the public contract, word for word."""


def catalogue(text: str = "", folder: Path = Path("/etc/llama")) -> Catalogue:
    """Return the catalogue of a TOML text, without a file."""
    return catalogue_of(tomllib.loads(text), folder)


def models(**entries: dict[str, Any]) -> Catalogue:
    """Return the catalogue of these entries; each has a model unless it has a `base_url`."""
    members = {
        name: entry if "base_url" in entry else {"model_path": f"org/{name}", **entry}
        for name, entry in entries.items()
    }
    return catalogue_of({"models": members}, "/etc/llama")


def mistake(text: str, folder: Path) -> InvalidCatalogue:
    """Return the error for a file with this text, which is `folder`/models.toml."""
    path = folder / "models.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidCatalogue) as caught:
        read_catalogue(path)
    return caught.value

"""Whatever a YAML file holds becomes a catalogue that can be read, and remarks."""

from __future__ import annotations

import tomllib
from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cli.drafts import toml_text
from orchestrator.cli.llama_swap import convert
from orchestrator.pool.catalogue import catalogue_of

NAMES: Final = st.sampled_from(["a", "b", "a b", "org/a:tag", "", "日本", "a:x"])
TEXTS: Final = st.one_of(
    NAMES,
    st.text(max_size=8),
    st.sampled_from(["${PORT}", "${MODEL_ID}", "${m}", "${env.X}", "http://127.0.0.1:${PORT}"]),
)
SCALARS: Final = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(-2, 900), st.floats())
ANYTHING: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FLAGS: Final = st.sampled_from(
    (
        *("-m a.gguf", "-hf org/a", "-c 512", "-c x", "-np 4", "--embedding", "--pooling mean"),
        *("-ctk q8_0", "-ctv q8_0", "--host 0.0.0.0", "--port ${PORT}", "${m}", "-ngl 9", "# x"),
        *("'", "--mmproj p"),
    )
)
COMMANDS: Final = st.lists(FLAGS, max_size=6).map(lambda flags: " ".join(["llama-server", *flags]))


def tables(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return tables that may have these keys, each also with a wrong value."""
    return st.fixed_dictionaries(
        {}, optional={name: values | ANYTHING for name, values in known.items()}
    )


MODELS: Final = tables(
    cmd=COMMANDS,
    aliases=st.lists(NAMES, max_size=3),
    ttl=st.integers(-1, 60),
    macros=st.dictionaries(st.just("m"), TEXTS),
    filters=tables(setParamsByID=st.dictionaries(NAMES, ANYTHING)),
    env=st.lists(TEXTS),
)
CONFIGS: Final = tables(
    models=st.dictionaries(NAMES, MODELS, max_size=3),
    groups=st.dictionaries(NAMES, tables(members=st.lists(NAMES), swap=st.booleans())),
    hooks=tables(on_startup=tables(preload=st.lists(NAMES))),
    peers=st.dictionaries(NAMES, tables(proxy=TEXTS, models=st.lists(NAMES, max_size=3))),
    macros=st.dictionaries(st.just("m"), TEXTS),
    globalTTL=st.integers(0, 900),
)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(CONFIGS)
def test_any_configuration_becomes_entries_that_a_catalogue_accepts(config: dict[str, Any]) -> None:
    """Each by itself: names that llama-swap would not accept twice may meet."""
    made = convert(config, {"X": "x"}, None)
    for draft in made.drafts.values():
        text = toml_text([draft], [why for _, why in made.remarks])
        catalogue_of(tomllib.loads(text))

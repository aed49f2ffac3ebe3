"""Extra args that the binary would exit for are refused while the running model still runs."""

from __future__ import annotations

import pytest

from orchestrator.errors import RefusedArgument
from orchestrator.settings.extra_args import check_known, template_of
from orchestrator.settings.help_text import Catalogue, parse_help
from tests.kit.sentences import assert_sentence

HELP = """\
-m,    --model FNAME                    model path to load
-c,    --ctx-size N                     size of the prompt context
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--kv-unified [on|off]                   one KV buffer
--temp, --temperature N                 temperature
--no-repack                             disable weight repacking
--control-vector-layer-range START END
                                        layer range
--rope-scaling {none,linear,yarn}       RoPE frequency scaling method
--spec-type none,ngram-mod,ngram-simple
                                        drafting
-dev,  --device <dev1,dev2,..>          devices
--poll <0...100>                        polling level
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, q8_0
--chat-template JINJA_TEMPLATE          template
--draft-max N                           the argument has been removed. use --spec-draft-n-max
"""


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    found = parse_help(HELP)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "args",
    [
        "",
        "-c 4096",
        "--ctx_size 4096 --temp -0.5",
        "-fa on",
        "-fa 1 --flash-attn enabled",
        "--kv-unified 0",
        "--no-repack -c 1",
        "--control-vector-layer-range 1 2",
        "--spec-type ngram-mod,ngram-simple",
        "--device anything,else --poll 7",
        "-ctk q8_0 --rope-scaling yarn",
        "--chat-template chatml",
        "--chat-template --nothing-we-know",  # in doubt it is a value
    ],
)
def test_args_that_the_binary_accepts_pass(args: str, catalogue: Catalogue) -> None:
    check_known(tuple(args.split()), catalogue)


@pytest.mark.parametrize(
    ("key", "args"),
    [
        ("extra_args.unknown", "--tempp 1"),
        ("extra_args.unknown_field", "--max-seq-lengths 4096"),
        ("extra_args.unknown_far", "--qqqqqqqq"),
        ("extra_args.unknown_not_near", "--n-par 2"),
        ("extra_args.unknown_near_two", "--temper 1"),
        ("extra_args.unknown_flag_or_field", "--cachetype-kv q8_0"),
        ("extra_args.unknown_short_field", "--pind"),
        ("extra_args.unknown_field_of_two_words", "--on-busi queue"),
        ("extra_args.no_value", "--no-repack -c"),
        ("extra_args.flag_for_value", "-c --no-repack"),
        ("extra_args.two_values", "--control-vector-layer-range 1"),
        ("extra_args.choice", "-fa maybe"),
        ("extra_args.choice_of_list", "--spec-type ngram-mod,bogus"),
        ("extra_args.allowed_value", "-ctk F16"),
        ("extra_args.stray", "--no-repack true"),
        ("extra_args.stray_underscore", "_c 4096"),
        ("extra_args.attached", "--temp=0.5"),
        ("extra_args.removed", "--draft-max 3"),
    ],
)
def test_args_that_the_binary_would_exit_for_are_refused(
    key: str, args: str, catalogue: Catalogue
) -> None:
    """B71: only the new server could have objected, after the old one was gone."""
    with pytest.raises(RefusedArgument) as refused:
        check_known(tuple(args.split()), catalogue)
    assert refused.value.field == "llama_extra_args"
    assert_sentence(key, str(refused.value))


def test_last_chat_template_of_the_args_counts() -> None:
    assert template_of(("--chat-template", "a", "--chat_template", "b", "-c", "1")) == "b"
    assert template_of(("--chat-template", "a")) == "a"
    assert template_of(("--chat-template", *"ab", "--chat-template", "c")) == "c"
    assert template_of(("-c", "--chat-template")) is None

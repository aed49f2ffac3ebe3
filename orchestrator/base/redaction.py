"""Redact secrets in text: the server's output, command lines, errors.

The patterns prefer false positives: those cost a word of a log line, a missed secret costs a key.
The exception is `token`, a word of every other line of llama.cpp: its value must look like a
secret too. Every pattern takes linear time on any line.
"""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "[redacted]"

_QUOTE: Final = r"[\\\"']{0,4}+"
_IS: Final = _QUOTE + r"\s{0,8}+[:=]\s{0,8}+" + _QUOTE
_SCHEME: Final = r"(?:(?:bearer|basic|digest|token|negotiate)\s{1,8}+)?"
_NAMES: Final = (
    r"(?:api[ _-]?key|secret|passw(?:or)?d|passphrase|credential|(?:access|private)[_-]?key)"
)

# (words, pattern): a text that the pattern matches has one of the words, in lower case or not;
# the pattern's only group is kept
_SECRETS: Final = (
    # recognised by their own form
    ("hf_", r"(hf_)(?:(?=[a-z]{0,40}[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{20,})"),
    (
        "sk- gh github_pat_ glpat- xox api_org_ aiza",
        r"\b(sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|api_org_|AIza)[\w-]{8,}",
    ),
    ("eyj", r"\b(eyJ)[\w-]{8,}+\.[\w-]++(?:\.[\w-]*+)?"),
    ("://", r"(?<=://)([^/\s:@]{0,256}+:)?[^/\s]{1,1024}(?=@)"),
    ("key= sig= auth= signature=", r"(?i)([?&](?:[\w-]{0,16}signature|key|sig|auth)=)[^\s\"'&]+"),
    # recognised by what precedes them
    ("authorization", rf"(?i)(authorization{_IS}{_SCHEME})[^\s\"'\\,]+"),
    ("bearer", r"(?i)(\bbearer\s{1,8}+)[\w.~+/=-]{8,}"),
    ("cookie", r"(?i)(cookie\s{0,8}+:\s{0,8}+)\S.*"),
    (
        "-api -hf --token --password",
        (
            rf"(?i)((?:--(?:api[_-]key|hf[_-]token|token|password)|-hft){_QUOTE}(?:\s{{0,8}}+[=,]|\s)"
            rf"\s{{0,8}}+{_QUOTE})[^\s\"'\\]+"
        ),
    ),
    (
        "key secret passw passphrase credential",
        (
            rf"(?i)({_NAMES}(?![\w-]{{0,32}}file)[\w-]{{0,32}}+{_IS})"
            r"(?:(?<=[\"'])[^\"'\\]+|[^\s\"'\\;&]+)"
        ),
    ),
    # `token` in the name of an environment variable, or with a value that is no number and no word
    ("token", rf"((?:[A-Z]_|\b)TOKEN{_IS})[^\s\"'\\;&]{{4,}}"),
    (
        "token",
        (
            rf"(?i)((?<![a-z0-9])token{_IS})"
            r"(?![\d.]+(?:[^\w.]|$))(?=[a-z]{0,40}[\d_]|[\w-]{16})[\w.~+/=-]{8,}"
        ),
    ),
)
_PATTERNS: Final = tuple((words.split(), re.compile(pattern)) for words, pattern in _SECRETS)


def redact(text: str) -> str:
    """Return the text with `[redacted]` in place of everything that looks like a secret."""
    lowered = text.lower()
    for words, pattern in _PATTERNS:
        if any(word in lowered for word in words):
            text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text

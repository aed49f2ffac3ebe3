"""Secrets do not leave through text: one place that blanks them in whatever is shown.

Applied to every line of the server's output before it is kept. What a secret looks like is a
table; a false positive costs a word of a log line, a false negative costs a key.
"""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "[redacted]"

_PATTERNS: Final = (
    re.compile(r"\b(hf_)[A-Za-z0-9]{8,}"),
    re.compile(r"\b(sk-)[A-Za-z0-9_-]{8,}"),
    re.compile(r"(?i)\b((?:proxy-)?authorization\s*[:=]\s*(?:bearer|basic)?\s*)[^\s\"',]+"),
    re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)(--(?:api-key|hf-token|token|password)[=\s]+)[^\s\"',]+"),
    re.compile(r"(?<=://)([^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(
        r"(?i)\b([A-Z0-9_.-]*(?:api[_-]?key|token|secret|password|passwd|credential)[A-Z0-9_]*"
        r"[\"']?\s*=\s*[\"']?)[^\s\"',;&]{4,}"
    ),
)


def redact(text: str) -> str:
    """Return the text with everything that looks like a secret blanked."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text

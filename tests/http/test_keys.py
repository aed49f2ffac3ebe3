"""API keys: how they are compared, and which ones a server gets."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from orchestrator.http.guards import keys


@pytest.mark.parametrize("sent", [b"first", b"second", b"third", b"", b"firs", b"x" * 9999])
@pytest.mark.parametrize("bearer", [True, False])
def test_every_key_is_compared_in_constant_time(
    sent: bytes, bearer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time it takes must not tell how much of a key is right, or which one it is (CVE-2024-7010
    in a peer).
    """
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    check = keys.Keys(["first", "second"])
    headers = [(b"authorization", b"Bearer " + sent)] if bearer else [(b"x-api-key", sent)]
    refusal = check({"type": "http", "path": "/x", "headers": headers})
    digests = [hashlib.sha256(one).digest() for one in (sent, b"first", b"second")]
    assert compared == [(digests[0], digests[1]), (digests[0], digests[2])]
    assert (refusal is None) == (sent in {b"first", b"second"})


def test_api_key_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        keys.Keys(["key", ""])

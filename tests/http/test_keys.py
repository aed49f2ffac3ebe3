"""How keys are compared."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from orchestrator.http.guards import keys


@pytest.mark.parametrize("shown", [b"first", b"second", b"third", b"", b"firs", b"x" * 9999])
def test_every_key_is_compared_in_constant_time(
    shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither how much of a key is right nor which of them it is may be told by the time it takes
    (CVE-2024-7010 in a peer).
    """
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    let_in = []

    async def app(*_: Any) -> None:
        let_in.append(True)

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    guard = keys.RequireKey(app, ["first", "second"])
    headers = [(b"authorization", b"Bearer " + shown)]
    asyncio.run(guard({"type": "http", "path": "/x", "headers": headers}, nothing, nothing))
    assert compared == [(shown, b"first"), (shown, b"second")]
    assert bool(let_in) == (shown in {b"first", b"second"})


def test_a_server_is_given_the_keys_it_can_read_and_is_protected_all_the_same() -> None:
    """llama-server reads a list with commas; a key it cannot take opens this API only."""
    assert keys.shareable(["good", "a,b", "k\t1", "\xe9"]) == ["good"]
    assert keys.shareable(["a,b"]) is True
    assert keys.shareable([]) is False

"""How keys are compared."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from orchestrator.http import keys


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
    asyncio.run(guard({"type": "http", "path": "/v1/models", "headers": headers}, nothing, nothing))
    assert compared == [(shown, b"first"), (shown, b"second")]
    assert bool(let_in) == (shown in {b"first", b"second"})

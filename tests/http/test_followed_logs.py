"""A log that many follow: the event loop does not pay for each of them."""

from __future__ import annotations

import collections
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.http.paths import PathRenamer
from orchestrator.server import output
from tests.kit.http import PREFIX, Serve

READERS, LINES = 8, 1500


@pytest.mark.external
def test_line_is_cleaned_and_renamed_once_for_all_readers_and_off_the_loop(
    serve: Serve,
    tiny_model: str,
    llama_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that talks a lot, and one reader, used to stop the loop for most of a second."""
    cleaned: collections.Counter[bytes] = collections.Counter()
    renamed: collections.Counter[str] = collections.Counter()
    threads: set[str] = set()
    clean, text = output._clean, PathRenamer.text

    def counted_clean(line: bytes) -> str:
        cleaned[line] += 1
        threads.add(threading.current_thread().name)
        return clean(line)

    def counted_text(self: PathRenamer, line: str) -> str:
        renamed[line] += 1
        if line.startswith("line "):
            threads.add(threading.current_thread().name)
        return text(self, line)

    monkeypatch.setattr(output, "_clean", counted_clean)
    monkeypatch.setattr(PathRenamer, "text", counted_text)
    talking = tmp_path / "talking"
    talk = f'for n in $(seq {LINES}); do echo "line $n"; done'
    talking.write_text(f'#!/bin/sh\n{talk}\nexec {llama_server} "$@"\n')
    talking.chmod(0o755)
    with serve(llama_server=str(talking)) as client:
        assert client.post(PREFIX + "/load", json={"model_path": tiny_model}).status_code == 200
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(_followed, [client] * READERS))
    assert found == [[f"line {n}" for n in range(1, LINES + 1)]] * READERS
    ours = [count for line, count in cleaned.items() if line.startswith(b"line ")]
    assert len(ours) == LINES
    assert sum(ours) < 2 * LINES  # two threads may begin with the same line
    assert sum(n for line, n in renamed.items() if line.startswith("line ")) < 2 * LINES
    assert threads <= {"llama-worker", "llama-warden-default"}


def _followed(client: httpx.Client) -> list[str]:
    """Follow the log up to the last of the lines."""
    found: list[str] = []
    params: dict[str, Any] = {"follow": True, "lines": 2000}
    with client.stream("GET", PREFIX + "/logs", params=params) as stream:
        for line in stream.iter_lines():
            found += [line] if line.startswith("line ") else []
            if len(found) == LINES:
                return found
    raise AssertionError("the log has ended")

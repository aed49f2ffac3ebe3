"""`make advisories`, against a database of this test's own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import advisories

ADVISORIES = {
    "OSV-1": {"summary": "requests are smuggled"},
    "OSV-2": {"summary": "a duplicate", "withdrawn": "2026-01-01T00:00:00Z"},
}


class Database(BaseHTTPRequestHandler):
    """Knows that version 1 of `holey` has a hole, and the one that every database knows."""

    holes = ({"holey": "1"}, advisories.KNOWN_HOLE)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"results": [self._result(query) for query in body["queries"]]})

    def do_GET(self) -> None:
        self._answer(ADVISORIES[self.path.rpartition("/")[2]])

    def _result(self, query: dict[str, Any]) -> dict[str, Any]:
        package = query["package"]
        is_hole = {package["name"]: query["version"]} in self.holes
        is_known = is_hole and package["ecosystem"] == "PyPI"
        return {"vulns": [{"id": name} for name in ADVISORIES]} if is_known else {}

    def _answer(self, members: object) -> None:
        body = json.dumps(members).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def lowest(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    packages = {"whole": "1", "holey": "2"}
    monkeypatch.setattr(advisories, "installed", lambda: {"whole": "2", "holey": "2"})
    monkeypatch.setattr(advisories, "lowest", lambda: packages)
    return packages


def test_lowest_version_with_a_hole_is_reported(
    database: str, lowest: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if nobody here has it installed: a user may."""
    assert advisories.main(database) == 0
    assert "no advisory" in capsys.readouterr().out
    lowest["holey"] = "1"
    assert advisories.main(database) == 1
    assert capsys.readouterr().out == "lowest allowed: holey 1: OSV-1 requests are smuggled\n"


@pytest.mark.usefixtures("lowest")
def test_database_that_knows_nothing_is_no_proof(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our query may be wrong."""
    monkeypatch.setattr(Database, "holes", ())
    assert advisories.main(database) == 1
    assert "must know" in capsys.readouterr().out


@pytest.mark.usefixtures("lowest")
def test_without_the_database_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses connections, or never answers: the check ends, and says that it was none."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert advisories.main(address, timeout_s=0.1) == 0
        assert capsys.readouterr().out.startswith("NOT CHECKED: no network")
    assert advisories.main(address) == 0
    assert capsys.readouterr().out.startswith("NOT CHECKED: no network")

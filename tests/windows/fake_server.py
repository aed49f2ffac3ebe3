"""A llama-server that does what FAKE says: `hang`, `children`, `crash`, or nothing special."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if "--help" in sys.argv:
    sys.exit(1)
FAKE = os.environ.get("FAKE", "")
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
if FAKE == "crash":
    sys.exit(7)
if sys.platform == "win32" and FAKE == "children":
    for flags in (0, subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP):
        subprocess.Popen(SLEEP, creationflags=flags)
while FAKE == "hang":
    time.sleep(60)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_open = self.path == "/health"
        wanted = f"Bearer {os.environ.get('LLAMA_API_KEY')}"
        is_known = self.headers.get("Authorization") == wanted
        body = json.dumps({"default_generation_settings": {"n_ctx": 512}}).encode()
        self.send_response(200 if is_open or is_known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()

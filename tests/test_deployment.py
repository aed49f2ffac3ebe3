"""Files of the how-to pages: the nginx site in front of a real server, and the systemd unit."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.kit.copies import EXAMPLES
from tests.test_examples import DEADLINE_S, started

NAME = "llm.example.org"
KEY = "key-of-a-user"


def tool(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        pytest.skip(f"install {name} for this test")
    return found


def run(*command: str | Path, returncode: int = 0) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == returncode, done.stdout
    return done.stdout


class Site(NamedTuple):
    """A running nginx: its socket, its certificate and the server behind it."""

    socket: Path
    certificate: Path
    behind: str

    def client(self, *, name: str = NAME, key: str | None = KEY) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = name == NAME
        return httpx.Client(
            base_url=f"https://{name}",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=DEADLINE_S,
            transport=httpx.HTTPTransport(uds=str(self.socket), verify=context),
        )


@pytest.fixture
def behind(state_dir: Path, tmp_path: Path) -> Iterator[str]:
    """`serve`, as the page says."""
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    options = ("--api-key-file", str(keys), "--allowed-host", NAME)
    command = ("orchestrator.cli", "serve", "--port", "0", "--json", *options)
    yield from started(*command, state_dir=state_dir, says="url")


@pytest.fixture
def site(behind: str, tmp_path: Path) -> Iterator[Site]:
    """The file as it is, except for paths and addresses."""
    nginx, openssl = tool("nginx"), tool("openssl")
    certificate, key, socket = (tmp_path / name for name in ("cert.pem", "cert.key", "socket"))
    key_options = (
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    names = ("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}")
    run(openssl, "req", "-x509", *key_options, *names, "-keyout", key, "-out", certificate)
    file = (EXAMPLES / "nginx.conf").read_text()
    for original, replacement in {
        "listen 443 ssl": f"listen unix:{socket} ssl",
        f"/etc/ssl/{NAME}.pem": str(certificate),
        f"/etc/ssl/{NAME}.key": str(key),
        "http://127.0.0.1:8642": behind,
    }.items():
        assert file.count(original) == 1, original
        file = file.replace(original, replacement)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    main = tmp_path / "main.conf"
    main.write_text(
        f"user root; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log {tmp_path}/access.log; {folders}\n{file}}}\n"
    )
    command = (nginx, "-q", "-p", tmp_path, "-e", tmp_path / "error.log", "-c", main)
    run(*command)  # returns when it listens
    try:
        yield Site(socket, certificate, behind)
    finally:
        run(*command, "-s", "stop")


def test_proxy_passes_only_the_allowed_name_key_and_pages(site: Site) -> None:
    """The proxy keeps the Host header, by which foreign names and pages are recognised."""
    status = "/api/inference/status"
    with site.client() as client:
        assert client.get(status).json()["state"] == "Idle"
        assert client.get("/").headers["Content-Type"].startswith("text/html")
        for origin, expected in ((f"https://{NAME}", 200), ("https://evil.example", 403)):
            answer = client.post("/api/inference/unload", headers={"Origin": origin})
            assert answer.status_code == expected, answer.text
    with site.client(key=None) as client:
        assert client.get(status).status_code == 401
        assert client.get("/healthz").status_code == 200
    with site.client(name="evil.example") as client:
        answer = client.get(status)
        assert (answer.status_code, answer.json()["category"]) == (403, "forbidden_host")


def test_proxy_streams_events_and_answers(site: Site, tiny_model: str) -> None:
    """Events and tokens arrive while the answer goes on."""
    with site.client() as client:
        body = {"model_path": tiny_model}
        load = client.post("/api/inference/load?wait=false", json=body)
        assert load.status_code == 202, load.text
        settled = client.get(f"{load.headers['Location']}?wait_s=25").json()
        assert settled["outcome"]["status"] == "loaded"
        last = {"Last-Event-ID": "0"}
        with client.stream("GET", "/api/inference/events", headers=last, timeout=10) as events:
            assert any('"Healthy"' in line for line in events.iter_lines())
        question = {"messages": [{"role": "user", "content": "?"}], "stream": True, "max_tokens": 8}
        with client.stream("POST", "/v1/chat/completions", json=question) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert len(lines) > 8
        assert lines[-1] == "data: [DONE]"


def test_large_request_passes_the_proxy(site: Site) -> None:
    """Images are part of a request; the server answers it, not the proxy."""
    body = {"model_path": "x" * (3 << 20)}
    with site.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "not_loaded"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd only logs a misspelt directive, and ignores it."""
    analyze = tool("systemd-analyze")
    text = (EXAMPLES / "llama-orchestrator.service").read_text()
    program = "/opt/llama-orchestrator/bin/llama-orchestrator"
    assert text.count(program) == 1
    unit = tmp_path / "llama-orchestrator.service"
    unit.write_text(text.replace(program, sys.executable))
    assert run(analyze, "verify", "--man=no", unit) == ""
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KilMode=mixed"))
    assert "KilMode" in run(analyze, "verify", "--man=no", unit)

"""A Ray cluster of logical nodes on this machine, and our application on it.

It is deployed by the REST API of Serve, as `serve deploy` does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.kit.process import support
from tests.kit.process.servers import servers_of

APP = "llm"
BUILDER = "orchestrator.ray_serve:build_app"
START_S = 120.0
ANSWER_S = 60.0
LABELS = {"room": "two"}
"""Of the node that is not the head."""


class Cluster:
    """Two nodes, on which pools and fronts are placed.

    Attributes:
        client: Sends requests to Serve's proxy.
    """

    def __init__(self, dashboard: str, http_port: int, nodes: Any, state_dir: Path) -> None:
        self._serve = f"{dashboard}/api/serve/applications/"
        self._http_port = http_port
        self._nodes = nodes
        self.state_dir = state_dir
        self.url = f"http://127.0.0.1:{http_port}"
        self.client = httpx.Client(base_url=self.url, timeout=ANSWER_S, trust_env=False)

    def deploy(self, args: dict[str, Any], **pools: Any) -> None:
        """Deploy, and wait until it runs.

        Args:
            args: Of the builder; other ones are a new version, with new replicas.
            pools: Options of the deployment of pools, which change the present replicas.
        """
        app: dict[str, Any] = {
            "name": APP,
            "route_prefix": "/",
            "import_path": BUILDER,
            "args": {"state_dir": str(self.state_dir), "num_cpus": 0.5, **args},
        }
        if pools:
            app["deployments"] = [{"name": "Pool", **pools}]
        http = {"host": "127.0.0.1", "port": self._http_port}
        answer = httpx.put(
            self._serve,
            json={"http_options": http, "applications": [app]},
            timeout=ANSWER_S,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        self.until_running()

    def until_running(self) -> None:
        """Wait until the newest deployment is done, and a front answers."""
        support.until(lambda: self._is_running(), "the application runs", START_S)

    def _is_running(self) -> bool:
        app = self.status()
        assert app.get("status") != "DEPLOY_FAILED", app["message"]
        if app.get("status") != "RUNNING":
            return False
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/healthz").status_code == 200
        return False

    def details(self) -> dict[str, Any]:
        members: dict[str, Any] = httpx.get(self._serve, timeout=ANSWER_S, trust_env=False).json()
        return members

    @property
    def controller(self) -> int | None:
        """The pid of Serve's controller."""
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if one.name().startswith("ray::ServeContr"):
                    return one.pid
        return None

    def status(self) -> dict[str, Any]:
        app: dict[str, Any] = self.details()["applications"].get(APP, {})
        return app

    def replicas(self, state: str = "RUNNING") -> dict[str, dict[str, Any]]:
        """Return the pools that are in this state of Serve by id, with `pid` and `node_id`."""
        found = self.status().get("deployments", {}).get("Pool", {}).get("replicas", ())
        return {one["replica_id"]: one for one in found if one["state"] == state}

    def reports(self) -> list[dict[str, Any]]:
        """Return what a front knows of the replicas."""
        members: list[dict[str, Any]] = self.client.get("/api/replicas").json()["replicas"]
        return members

    def until_open(self, count: int) -> list[dict[str, Any]]:
        """Wait until so many replicas listen, and return their reports."""

        def those() -> list[dict[str, Any]] | None:
            found = [one for one in self.reports() if one["url"]]
            return found if len(found) == count else None

        return support.until(those, f"{count} replicas listen", START_S)

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": model, **more})

    @property
    def other_node(self) -> str:
        """The id of the node that is not the head."""
        (node,) = self._nodes.worker_nodes
        return str(node.node_id)

    def kill_other_node(self) -> None:
        """Kill the raylet of that node, and wait for its end."""
        (node,) = self._nodes.worker_nodes
        self._nodes.remove_node(node, allow_graceful=False)

    def add_node(self) -> None:
        self._nodes.add_node(num_cpus=2, labels=LABELS)

    @property
    def servers(self) -> set[int]:
        return servers_of(self.state_dir)

    def where(self, model: str) -> dict[str, Any]:
        """Return the report of the replica where a model is resident."""

        def there() -> dict[str, Any] | None:
            for report in self.reports():
                if any(
                    (one["name"], one["value"]) == (model, "loaded") for one in report["models"]
                ):
                    return report
            return None

        return support.until(there, f"{model} is resident")


class Stream:
    """A stream of the echo server, read on a thread of its own: it pauses until `go`."""

    def __init__(self, cluster: Cluster, model: str, folder: Path, events: int = 3) -> None:
        self.left: Path = folder / "left"
        self._go = folder / "go"
        self._body = {"model": model, "stream": events, "until": str(self._go)}
        self._body["left"] = str(self.left)
        self._url = cluster.url
        self.has_begun: threading.Event = threading.Event()
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.has_begun.wait(ANSWER_S), "the stream does not begin"

    def _read(self) -> None:
        with httpx.Client(base_url=self._url, timeout=None, trust_env=False) as client:
            try:
                with client.stream("POST", "/v1/chat/completions", json=self._body) as answer:
                    for line in answer.iter_lines():
                        self.lines += [line] if line else []
                        self.has_begun.set()
            except httpx.HTTPError as error:
                self.error = error
            finally:
                self.has_begun.set()

    def go(self) -> None:
        """Let the server send the rest."""
        self._go.touch()

    def end(self) -> None:
        """Wait until it has ended, in whatever way."""
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive(), "the stream does not end"

    def finish(self) -> list[str]:
        """Read to the end, and return the lines."""
        self.go()
        self.end()
        assert self.error is None, self.error
        return self.lines


@contextlib.contextmanager
def cluster_of(folder: Path, count: int = 2) -> Iterator[Cluster]:
    """Start a cluster, and end everything of it."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster as Nodes

    port = _free_port()
    nodes = Nodes(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": port},
    )
    try:
        for _ in range(count - 1):
            nodes.add_node(num_cpus=2, labels=LABELS)
        ray.init(address=nodes.address, log_to_driver=False)
        made = Cluster(f"http://127.0.0.1:{port}", _free_port(), nodes, folder / "state")
        try:
            yield made
        finally:
            made.client.close()
            serve.shutdown()
            ray.shutdown()
    finally:
        nodes.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def write_wrapper(folder: Path, program: str) -> str:
    """Write a script that starts a server as its child, and does not hand on signals."""
    path = folder / "wrapped-llama-server"
    path.write_text(f'#!/bin/sh\n"{program}" "$@"\nexit $?\n')
    path.chmod(0o755)
    return str(path)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

"""Models of other servers (`base_url`): where each is, and whether it answers.

Such a server is passed on to and watched, and never started or stopped.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from orchestrator.base import threads
from orchestrator.base.log import event_log
from orchestrator.base.tokens import Generation
from orchestrator.errors import InvalidRequest, OrchestratorError, Problem
from orchestrator.pool.entries import Entry
from orchestrator.runtime.answers import LeasedServer

INTERVAL_S: Final = 10.0
_ANSWER_S: Final = 5.0
_CONNECTIONS: Final = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_log = event_log("orchestrator.pool")
_Key = tuple[str, str | None]


def server_of(entry: Entry) -> LeasedServer:
    """Return the server of such an entry. Raises InvalidRequest if its key cannot be read."""
    key = None
    if entry.api_key_file is not None:
        try:
            key = entry.api_key_file.read_text().strip()
        except OSError as error:
            message = f"api_key_file of {entry.name} cannot be read ({error.strerror})"
            raise InvalidRequest.because(message, field="api_key_file") from error
    url = (entry.base_url or "").removesuffix("/v1")
    return LeasedServer(url, 0, Generation(0), key, entry.kind)


def api_of(base_url: str) -> str:
    """Return where the API of another server begins: below `/v1`, unless it has another path."""
    return base_url if urlsplit(base_url).path else f"{base_url}/v1"


def ask(entry: Entry) -> Problem | None:
    """Ask such a server for its models; return why it is of no use now. Blocks for some seconds."""
    try:
        server = server_of(entry)
        api = urlsplit(api_of(entry.base_url or ""))
        connect = _CONNECTIONS[api.scheme](api.hostname or "", api.port, timeout=_ANSWER_S)
        headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        with closing(connect):
            connect.request("GET", f"{api.path}/models", headers=headers)
            status = connect.getresponse().status
    except OrchestratorError as error:
        return error.problem
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Problem("bad_gateway", f"the server of {entry.name} does not answer ({error})")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        what = "its api_key_file" if server.api_key else "requests without a key: set api_key_file"
        return Problem("bad_gateway", f"the server of {entry.name} refuses {what}")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Problem("bad_gateway", f"the server of {entry.name} answers {status}")
    return None


class Watch:
    """Asks the servers of some entries again and again, on one thread, if there are any.

    What it finds is for display; requests are passed on in any case.

    Args:
        ask: Returns why a server is of no use now. May block.
    """

    def __init__(
        self,
        ask: Callable[[Entry], Problem | None] = ask,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._ask = ask
        self._interval_s = interval_s
        self._entries: tuple[Entry, ...] = ()
        self._found: Mapping[_Key, Problem | None] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def problem(self, entry: Entry) -> Problem | None:
        """Return why its server was of no use when it was last asked."""
        return self._found.get(_key(entry))

    def lose(self, entry: Entry, problem: Problem) -> None:
        """Note that a request has found its server of no use, until it is asked again."""
        self._found = {**self._found, _key(entry): problem}

    def of(self, entries: Iterable[Entry]) -> None:
        """Watch the servers of these entries from now on, those that are not ours."""
        with self._wake:
            self._entries = tuple(entry for entry in entries if entry.base_url is not None)
            self._wake.notify_all()
            if self._entries and self._thread is None:
                thread = threading.Thread(target=self._run, name="llama-pool-watch", daemon=True)
                threads.start(thread)
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._wake:
                entries = self._entries
                if not entries:
                    self._thread = None
                    return
            self._found = {_key(entry): self._look(entry) for entry in entries}
            with self._wake:
                if self._entries == entries:
                    self._wake.wait(self._interval_s)

    def _look(self, entry: Entry) -> Problem | None:
        before, now = self._found.get(_key(entry)), self._ask(entry)
        if now is not None and before is None:
            _log("warning", "elsewhere.lost", model=entry.name, error=now.message)
        elif now is None and before is not None:
            _log("info", "elsewhere.back", model=entry.name)
        return now


def _key(entry: Entry) -> _Key:
    return entry.name, entry.base_url

"""What a front knows of the replicas, and its connections to them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from orchestrator.base.log import event_log
from orchestrator.cluster.door import FRONT_HEADER
from orchestrator.cluster.routing import ReplicaReport, choose

Ask = Callable[[], Awaitable[Iterable[object]]]
Body = bytes | AsyncIterator[bytes] | None

_POLL_S: Final = 0.5
_LOOK_S: Final = 0.2
_CONNECT_S: Final = 5.0
_KEEPALIVE_S: Final = 5.0  # less than a listener keeps an idle connection
_log = event_log("orchestrator.cluster")


class NotConnected(Exception):
    """The replica could not be reached: it has not seen the request."""


class Lost(Exception):
    """The connection ended before the answer began."""


class Replicas:
    """The newest reports of the replicas.

    Args:
        ask: Asks all replicas for their reports; the answer of one that gives none is an error.

    Attributes:
        reports: Of those that gave one, without those that were lost since.
    """

    def __init__(self, ask: Ask) -> None:
        self.reports: tuple[ReplicaReport, ...] = ()
        self._ask = ask
        self._asking: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def polled(self) -> AsyncIterator[None]:
        """Poll the replicas in this block."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            trust_env=False,
        )
        polling = asyncio.ensure_future(self._poll())
        try:
            yield
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            await self._session.close()

    async def _poll(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_POLL_S)

    async def refresh(self) -> None:
        """Ask all replicas; callers at the same time share one question."""
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._refresh())
        await asyncio.shield(self._asking)

    async def _refresh(self) -> None:
        try:
            answers = await self._ask()
            self.reports = tuple(one for one in answers if isinstance(one, ReplicaReport))
        except Exception as error:  # noqa: BLE001 (Ray raises many kinds; what is known stays)
            _log("warning", "replicas.unknown", error=f"{type(error).__name__}: {error}")
        finally:
            self._asking = None

    @property
    def open(self) -> tuple[ReplicaReport, ...]:
        """Those that listen."""
        return tuple(report for report in self.reports if report.url is not None)

    def lose(self, lost: ReplicaReport) -> None:
        """Forget a replica that cannot be reached, until it reports again."""
        self.reports = tuple(one for one in self.reports if one.replica != lost.replica)

    async def choose(
        self, asked: str | None, tried: Collection[str], until: float
    ) -> ReplicaReport | None:
        """Return the replica for a model, and wait for one until this monotonic time.

        Where the model is not resident, the replicas are asked first: they may know of a load that
        has just begun.
        """
        while True:
            found = choose(self.reports, asked, tried)
            model = None if found is None else found.find(asked)
            if model is None or model.value != "loaded":
                await self.refresh()
                found = choose(self.reports, asked, tried)
            if found is not None or time.monotonic() >= until:
                return found
            await asyncio.sleep(_LOOK_S)

    async def send(
        self,
        replica: ReplicaReport,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Body = None,
    ) -> aiohttp.ClientResponse:
        """Send a request to a replica, and return its response as soon as that begins.

        Raises:
            NotConnected, Lost: there is none.
        """
        assert self._session is not None  # noqa: S101 (requests come inside of `polled`)
        sent: CIMultiDict[str] = CIMultiDict(headers)
        sent[FRONT_HEADER] = f"Bearer {replica.key}"
        url = URL(f"{replica.url}{target}", encoded=True)
        try:
            return await self._session.request(
                method, url, headers=sent, data=body, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, TimeoutError) as error:
            self.lose(replica)
            raise NotConnected from error
        except aiohttp.ClientError as error:
            self.lose(replica)
            raise Lost from error


def asked_by(handle: Any) -> Ask:
    """Return what asks all replicas of a Serve deployment.

    `broadcast` is alpha in Ray 2.60. It asks each replica at once, past any queue.
    """

    async def ask() -> Iterable[object]:
        answers: Iterable[object] = await handle.broadcast("report").results_async(
            timeout_s=_CONNECT_S, return_exceptions=True
        )
        return answers

    return ask

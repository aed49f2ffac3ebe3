"""Whose requests are answered: the Host and the Origin of everything that arrives.

A name that somebody else controls may come to mean this machine (DNS rebinding), and any web page
may send requests to it (CSRF). So a request has to be addressed to an address, which nobody can
rebind, or to a name that is this machine's own or was allowed; and what a browser sends for a page
has to be for a page of this very origin. Nothing is shared across origins: no answer carries a CORS
header, and a preflight is refused like everything else.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.errors import InvalidRequest
from orchestrator.http.problems import http_problem, respond

_AUTHORITY: Final = re.compile(
    r"(?:\[(?P<v6>[0-9a-f:.]+(?:%[\w.~-]+)?)\]|(?P<name>[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?)\.?)"
    r"(?::(?P<port>\d{0,5}))?",
    re.ASCII,
)
_PORTS: Final = {"http": 80, "https": 443}
_OWN_SITE: Final = frozenset({b"", b"same-origin", b"none"})  # none: typed, or a bookmark
_SEEN: Final = frozenset(
    {b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"}
)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Authority(NamedTuple):
    """A host and maybe a port, as a Host header and an origin have them.

    Attributes:
        name: In lower case; an address in its shortest form.
        address: What it is, if it is one.
    """

    name: str
    port: int | None
    address: _Address | None


class RefuseForeign:
    """ASGI middleware.

    Args:
        allowed_hosts: Names this service has beside its own, from `checked_hosts`.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._allowed = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = None if scope["type"] == "lifespan" else self._problem(scope)
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await respond(problem)(scope, receive, send)

    def _problem(self, scope: Scope) -> dict[str, Any] | None:
        """Return why this is not answered."""
        found: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            if name in _SEEN:
                found.setdefault(name, []).append(value)
        given = found.get(b"host", [])
        host = authority(given[0].decode("latin-1")) if len(given) == 1 else None
        if host is None:
            return http_problem(400, "send exactly one Host header, with a name or an address")
        if not self._is_ours(host, scope.get("server")):
            detail = (
                f"this service does not go by the name {host.name}: use its address, or allow the "
                f"name with --allowed-host {host.name} (allowed_hosts of create_app)"
            )
            return http_problem(403, detail, category="forbidden_host")
        if not _is_same_origin(host, found, scope.get("method", "GET")):
            detail = (
                "a page of another origin may not use this service: open one that this service "
                "serves, or put both behind a proxy that keeps the Host header"
            )
            return http_problem(403, detail, category="forbidden_origin")
        return None

    def _is_ours(self, host: Authority, server: tuple[str, int | None] | None) -> bool:
        """Can only this machine, or a name somebody allowed, be meant by that?

        Args:
            server: Where the request arrived. Of a connection this is an address, whatever the
                client sends; a client within this process (a test client) has no connection and
                says the name it calls us. Some servers copy the Host header to it: a name that
                anybody could own has a dot.
        """
        if host.name == "localhost" or host.name in self._allowed:
            return True
        arrived = _address(server[0]) if server else None
        if host.address is not None:
            is_private = arrived is not None and arrived.is_loopback
            return host.address.is_loopback or not is_private
        called = server[0].lower() if server and arrived is None else None
        return called == host.name and "." not in host.name


def _is_same_origin(host: Authority, found: dict[bytes, list[bytes]], method: str) -> bool:
    """Does a browser say that nobody else's page has sent this?

    A program sends none of these headers. Following a link here from elsewhere is not a page's
    request, and nothing that is only shown does anything.
    """
    origins = found.get(b"origin", [])
    if len(origins) > 1 or (origins and not _names(origins[0].decode("latin-1"), host)):
        return False
    if _OWN_SITE.issuperset(found.get(b"sec-fetch-site", [])):
        return True
    is_opened = found.get(b"sec-fetch-mode") == [b"navigate"]
    is_opened &= found.get(b"sec-fetch-dest") == [b"document"]
    return is_opened and method in {"GET", "HEAD"}


def _names(origin: str, host: Authority) -> bool:
    """Is this origin the one that the Host header is of?"""
    scheme, _, rest = origin.partition("://")
    theirs, usual = authority(rest), _PORTS.get(scheme)
    if theirs is None or usual is None:
        return False
    return (theirs.name, theirs.port or usual) == (host.name, host.port or usual)


@lru_cache(maxsize=256)
def authority(text: str) -> Authority | None:
    """Return what a Host header, or an origin behind its scheme, says; None when it says nothing.

    Source: RFC 9110 section 7.2, RFC 3986 section 3.2.
    """
    found = _AUTHORITY.fullmatch(text.lower())
    if found is None:
        return None
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port < 1 << 16:
        return None
    address = _address(found["v6"] or found["name"])
    if address is None and found["v6"]:
        return None
    return Authority(str(address or found["name"]), port, address)


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def checked_hosts(given: Iterable[str]) -> frozenset[str]:
    """Return hosts as they are compared.

    Raises:
        InvalidRequest: no name or address alone: with a port, a scheme, a pattern (field
            `allowed_hosts`).
    """
    if isinstance(given, str):
        given = (given,)
    return frozenset(map(_checked_host, given))


def _checked_host(host: object) -> str:
    text = host.strip() if isinstance(host, str) else ""
    parsed = authority(f"[{text}]" if text.count(":") > 1 and text[0] != "[" else text)
    if parsed is None or parsed.port is not None or text.endswith(":"):
        message = f"allowed host {host!r} is no name or address: give one without scheme and port"
        raise InvalidRequest.because(message, field="allowed_hosts")
    return parsed.name

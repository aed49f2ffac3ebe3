"""Checks of Host and Origin, against DNS rebinding and cross-site requests.

A foreign name can be made to resolve to this machine, and any web page can send requests here. So
a request must be addressed to an IP address, which cannot be rebound, or to a name that is local or
allowed, and a browser must send it for a page of this origin. No answer carries a CORS header, and
preflights are refused like other foreign requests.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from orchestrator.errors import InvalidRequest
from orchestrator.http.guards import PROBED_PATHS, Check
from orchestrator.http.paths import own_path
from orchestrator.http.problems import http_problem

_AUTHORITY: Final = re.compile(
    r"(?:\[(?P<v6>[0-9a-f:.]+(?:%[\w.~-]+)?)\]|(?P<name>[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?)\.?)"
    r"(?::(?P<port>\d{0,5}))?",
    re.ASCII,
)
_PORTS: Final = {"http": 80, "https": 443}
_OWN_SITE: Final = frozenset({"", "same-origin", "none"})  # none: typed, or a bookmark

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Authority(NamedTuple):
    """A host and an optional port, as in a Host header or an origin."""

    name: str  # in lower case; an address in its shortest form
    port: int | None
    address: _Address | None


def refuse_foreign(allowed: frozenset[str] = frozenset()) -> Check:
    """Return the check of Host and Origin; the allowed hosts are from `checked_hosts`."""

    def check(scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        is_probe = own_path(scope) in PROBED_PATHS and scope.get("http_version") == "1.0"
        if is_probe and not hosts:  # as old load balancers send it; a browser sends a Host
            return None
        if len(hosts) != 1 or (host := authority(hosts[0])) is None:
            return http_problem(400, "send exactly one Host header, with a name or an address")
        if host.name not in allowed and not is_local(host, scope.get("server")):
            detail = (
                f"{host.name} is not a name of this service: use its address, or allow the name "
                f"with --allowed-host {host.name} (allowed_hosts of create_app)"
            )
            return http_problem(403, detail, category="forbidden_host")
        if not _is_same_origin(host, headers, scope.get("method", "GET")):
            detail = (
                "a page of another origin must not use this service: use its own panel, or serve "
                "both behind one proxy that keeps the Host header"
            )
            return http_problem(403, detail, category="forbidden_origin")
        return None

    return check


def is_local(host: Authority, server: tuple[str, int | None] | None) -> bool:
    """Return whether the host can only mean this machine.

    Args:
        server: Where the request arrived. Over a socket this is an address, whatever the client
            sends. A test client has no socket, and gives the name that it calls the app by. Some
            servers copy the Host header here: a name that anybody can own has a dot.
    """
    arrived = _address(server[0]) if server else None
    if host.address is not None:
        return host.address.is_loopback or arrived is None or not arrived.is_loopback
    called = server[0].lower() if server and arrived is None else None
    return host.name == "localhost" or (called == host.name and "." not in host.name)


def is_from_elsewhere(scope: Scope) -> bool:
    """Return whether a request arrived at an address that other machines can reach."""
    server = scope.get("server")
    arrived = _address(server[0]) if server else None
    return arrived is not None and not arrived.is_loopback


def has_foreign_name(hosts: Iterable[str]) -> bool:
    """Return whether one of these hosts, from `checked_hosts`, is a name of another machine."""
    addresses = {host: _address(host) for host in hosts if host != "localhost"}
    return any(one is None or not one.is_loopback for one in addresses.values())


def _is_same_origin(host: Authority, headers: Headers, method: str) -> bool:
    """Return whether no page of another origin has sent the request.

    Programs send none of these headers. A link may be followed, as showing a page changes nothing.
    """
    origins = headers.getlist("origin")
    if len(origins) > 1 or (origins and not _is_origin_of(origins[0], host)):
        return False
    if _OWN_SITE.issuperset(headers.getlist("sec-fetch-site")):
        return True
    is_link = headers.getlist("sec-fetch-mode") == ["navigate"]
    is_link &= headers.getlist("sec-fetch-dest") == ["document"]
    return is_link and method in {"GET", "HEAD"}


def _is_origin_of(origin: str, host: Authority) -> bool:
    scheme, _, rest = origin.partition("://")
    theirs, default = authority(rest), _PORTS.get(scheme)
    if theirs is None or default is None:
        return False
    return (theirs.name, theirs.port or default) == (host.name, host.port or default)


@lru_cache(maxsize=256)
def authority(text: str) -> Authority | None:
    """Parse a Host header (RFC 9110), or an origin without its scheme; None if it is neither."""
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


def checked_hosts(given: str | Iterable[str]) -> frozenset[str]:
    """Return hosts in the form in which they are compared.

    Raises:
        InvalidRequest: one is not a bare name or address (field `allowed_hosts`).
    """
    return frozenset(map(_checked_host, (given,) if isinstance(given, str) else given))


def _checked_host(host: object) -> str:
    text = host.strip() if isinstance(host, str) else ""
    parsed = authority(f"[{text}]" if text.count(":") > 1 and text[0] != "[" else text)
    if parsed is None or parsed.port is not None or text.endswith(":"):
        message = f"{host!r} is not a host name or address: give it without scheme and port"
        raise InvalidRequest.because(message, field="allowed_hosts")
    return parsed.name

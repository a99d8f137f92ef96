"""Who may use the server, and what other pages in the same browser may not.

The server stands on a machine where people also visit web sites. So each request must name a host that is ours (a site
that lets its name point here, DNS rebinding, names its own); whatever changes something must come from our own page and
bring what stands in it; and from other machines nothing is told without the token that the command printed.
"""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "pertoken"
HEADER = "x-pertoken"
"""Our own pages send the token that stands in them under this name."""

HEADERS = {
    "content-security-policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""Of every answer; what a page may load stands in the page itself."""


def is_local(host: str) -> bool:
    """Whether only programs of this machine reach a server on this address.

    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("0.0.0.0")
    (True, True, False)
    """
    return host == "localhost" or (_address(host) or ipaddress.ip_address("0.0.0.0")).is_loopback


class Guard:
    """The application behind the checks; what does not pass them never reaches it."""

    def __init__(self, app: App, host: str) -> None:
        self._app, self._host = app, host
        self.page_token = secrets.token_urlsafe(24)
        """Stands in our pages, which other pages cannot read."""
        self.access_token = None if is_local(host) else secrets.token_urlsafe(24)
        """Opens the server to other machines; None where none can reach it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                theirs = message.get("headers", [])
                named = {name.lower() for name, _ in theirs} & {b"cache-control"}  # an answer may know better
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*theirs, *(pair for pair in ours if pair[0] not in named)]
            await send(message)

        if not self._is_ours(headers.get("host", "")):
            return await _answer(with_headers, 421, "this server does not go by that name")
        if self.access_token is not None and not _same(self._shown(headers), self.access_token):
            return await self._let_in(scope, with_headers)
        if scope["method"] not in ("GET", "HEAD") and (problem := self._foreign(scope, headers)):
            return await _answer(with_headers, 403, problem)
        return await self._app(scope, receive, with_headers)

    def _is_ours(self, host: str) -> bool:
        """Whether the Host header names us: a name that somebody else can point here is none of ours."""
        name = _name_of(host)
        address = _address(name)
        if self.access_token is None:
            return name in ("localhost", self._host) or (address is not None and address.is_loopback)
        machine = socket.gethostname().lower()
        return address is not None or name in ("localhost", self._host.lower(), machine, f"{machine}.local")

    def _shown(self, headers: MutableMapping[str, str]) -> str:
        """The access token in the cookie."""
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return ""
        return found.value if found else ""

    async def _let_in(self, scope: Scope, send: Send) -> None:
        """The first link brings the token: it goes into a cookie, and out of the address."""
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        rest = [(name, value) for name, value in query if name != "token"]
        token = next((value for name, value in query if name == "token"), "")
        if scope["method"] != "GET" or not _same(token, self.access_token or ""):
            return await _answer(send, 401, "open the link that `pertoken studio` has printed: it holds the token")
        path = "/" + scope.get("raw_path", scope["path"].encode()).decode("latin-1").lstrip("/")
        cookie = f"{COOKIE}={self.access_token}; HttpOnly; SameSite=Strict; Path=/"
        place = path + (f"?{urlencode(rest)}" if rest else "")
        return await _answer(send, 303, "", [(b"location", place.encode()), (b"set-cookie", cookie.encode())])

    def _foreign(self, scope: Scope, headers: MutableMapping[str, str]) -> str:
        """What is wrong with a request that changes something; empty if it comes from a page of ours."""
        if headers.get("origin") != f"{scope.get('scheme', 'http')}://{headers.get('host', '')}":
            return "this does not come from a page of this server"
        if not _same(headers.get(HEADER, ""), self.page_token):
            return "this page is of another server, or of this one before it was started anew: load it again"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "expected JSON"
        return ""


async def _answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *(headers or [])]})
    await send({"type": "http.response.body", "body": text.encode()})


def _name_of(host: str) -> str:
    """A Host header without its port, in small letters; an IPv6 address without its brackets.

    >>> _name_of("[::1]:8600"), _name_of("LocalHost:8600")
    ('::1', 'localhost')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _same(one: str, other: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(one.encode(), other.encode())

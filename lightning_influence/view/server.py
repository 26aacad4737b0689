"""A server for the page, for whoever sits at this machine: it hands out audits and keeps reviews."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from lightning_influence.page.assets import static_files
from lightning_influence.view.audits import Audits, ChangedError, ViewError, tag_of

PORT = 6116
TOKEN_HEADER = "X-Influence-Token"

_LARGEST_REVIEW = 2**24
_JSON, _TEXT = "application/json; charset=utf-8", "text/csv; charset=utf-8"
_LOOPBACK = {"127.0.0.1", "localhost", "[::1]", "::1"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ViewServer(ThreadingHTTPServer):
    """Serves the audits of a directory; ``serve_forever`` until ``shutdown``.

    Args:
        directory: An audit's directory, or one that holds some.
        port: 0 for any that is free; None for the usual one, or another if that is taken.
        host: Where to listen. Anything but this machine itself is for those who know their network: whoever has the
            address can read the audits and write reviews.

    Attributes:
        token: What every request for data has to know.
        url: The address to open, with the token.

    Raises:
        ViewError: If there is no audit, or the port can't be had.
    """

    daemon_threads = True

    def __init__(self, directory: str | os.PathLike[str], port: int | None = None, host: str = "127.0.0.1") -> None:
        self.audits = Audits(Path(directory).expanduser().resolve())
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((host, PORT if port is None else port), _Handler)
        except (OSError, OverflowError) as error:
            if port is not None or not isinstance(error, OSError):
                raise ViewError(
                    f"port {port} on {host} can't be had ({error}); pass another port, or 0 for any that is free."
                ) from error
            super().__init__((host, 0), _Handler)
        name = "localhost" if host in ("", "0.0.0.0", "::") else host
        self.names = {*_LOOPBACK, host, self.server_name} - {""}
        self.any_name = host not in _LOOPBACK
        self.url = f"http://{name}:{self.server_address[1]}/?token={quote(self.token)}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; anything else is told as usual."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def serve(
    directory: str | os.PathLike[str],
    port: int | None = None,
    *,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the audits of a directory until Ctrl-C; see ``ViewServer``.

    Args:
        directory: An audit's directory, or one that holds some, such as ``lightning_logs``.
        port: 0 for any that is free; None for the usual one, or another if that is taken.
        host: Where to listen; this machine alone by default.
        open_browser: Whether to open the page.
        say: Gets the address.

    Raises:
        ViewError: If there is no audit, or the port can't be had.
    """
    with ViewServer(directory, port, host) as server:
        count = len(server.audits.found())
        say(f"{count} audit{'s' if count != 1 else ''} in {server.audits.root}\n\n  {server.url}\n\nCtrl-C to stop")
        if open_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


class _Refused(Exception):
    """A request that gets no data, with the reason for whoever asked."""

    def __init__(self, status: HTTPStatus, told: str) -> None:
        super().__init__(told)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"  # by default refusals have no status
    server_version, sys_version = "lightning-influence", ""
    timeout = 60  # of a connection that says nothing

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request, or by a method that there is not, as everything else is refused."""
        status = {501: HTTPStatus.METHOD_NOT_ALLOWED}.get(code, HTTPStatus(code if code < 500 else 400))
        self._refuse(status, f"the request can't be answered: {status.phrase}")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep addresses, and the token in them, off the terminal."""

    def _answer(self, make: Callable[[str, dict[str, str]], tuple[str, bytes]]) -> None:
        try:
            self._check_host()
            address = urlsplit(self.path)
            asked = parse_qs(address.query, keep_blank_values=True, max_num_fields=8)
            kind, body = make(address.path, {name: values[-1] for name, values in asked.items()})
            self._send(HTTPStatus.OK, kind, body)
        except _Refused as refused:
            self._refuse(refused.status, str(refused))
        except KeyError:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such thing")
        except ChangedError as error:
            self._refuse(HTTPStatus.PRECONDITION_FAILED, str(error))
        except ViewError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request can't be understood")
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._refuse(HTTPStatus.NOT_FOUND, f"it can't be read: {error.strerror}")

    def _get(self, path: str, asked: dict[str, str]) -> tuple[str, bytes]:
        name = path.removeprefix("/") or "index.html"
        if name in static_files():
            return static_files()[name]
        audits = self.server.audits
        routes: dict[str, Callable[[], tuple[str, bytes]]] = {
            "runs": lambda: (_JSON, json.dumps(audits.runs()).encode()),
            "audit": lambda: (_JSON, audits.document(asked["id"])),
            "pictures": lambda: (_JSON, audits.pictures(asked["id"], asked["chunk"])),
            "review": lambda: (_TEXT, audits.review(asked["id"])),
        }
        self._check_token()
        return routes[name]()

    def _post(self, path: str, asked: dict[str, str]) -> tuple[str, bytes]:
        self._check_token()
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > _LARGEST_REVIEW:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a review has at most {_LARGEST_REVIEW:,} bytes")
        body = self.rfile.read(int(length))
        if path != "/review":
            raise KeyError(path)
        if len(body) < int(length):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the review broke off")
        first = body.decode("utf-8-sig").partition("\n")[0].strip().split(",")
        if not {"index", "decision"} <= set(first):
            raise _Refused(HTTPStatus.BAD_REQUEST, "a review has the columns `index` and `decision`")
        self.server.audits.write_review(asked["id"], body, self.headers.get("If-Match", ""))
        return _TEXT, body

    def _check_host(self) -> None:
        """Refuse other names than this machine's: a page elsewhere could have its own name point here."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if not self.server.any_name and host not in self.server.names:
            raise _Refused(HTTPStatus.FORBIDDEN, "open the address that was printed")

    def _check_token(self) -> None:
        given = self.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "open the address that was printed, with its token")

    def _refuse(self, status: HTTPStatus, told: str) -> None:
        self.close_connection = True  # what was sent along is not read
        self._send(status, _JSON, json.dumps({"error": told}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}
        if kind == _TEXT:
            headers["ETag"] = tag_of(body)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, POST"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

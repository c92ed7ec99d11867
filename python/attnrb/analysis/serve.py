"""A report's page, served to this machine alone, with the row of any query computed when it is asked for.

Note: [Who may ask]
The server listens on 127.0.0.1. Another site's page, open in the same browser, could still send requests there: so the
Host header must name this address (which a site that lets its own name point here cannot do), the browser must not call
the request one of another site, and no answer may be read by another origin. Two addresses exist, both for GET alone,
and the second takes two numbers in range.
"""

from __future__ import annotations

import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch

from attnrb.analysis.page import packed_rows, page
from attnrb.analysis.report import AttentionReport

__all__ = ["ReportServer"]

_ASKED = re.compile(r"text=(\d{1,6})&query=(\d{1,6})", re.ASCII)
_SECONDS = 10.0  # after which a connection that says nothing is closed
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReportServer:
    """Serves the page of a report, and rows of attention. A context manager; `serve` runs until it is interrupted.

    Attributes:
        address: what to open in a browser.
    """

    def __init__(self, report: AttentionReport, port: int = 0) -> None:
        """Bind to 127.0.0.1.

        Args:
            report: made by ``analyze(..., keep_keys=True)``.
            port: 0 takes any that is free.

        Raises:
            ValueError: the report kept no keys.
            OSError: the port is taken.
            ImportError: the extra ``analysis`` is missing.
        """
        if not report.keys:
            raise ValueError("report: expected one made with keep_keys=True, got one without keys")
        self.report = report
        self._page = page(report, served=True).encode()
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.hosts = frozenset((f"127.0.0.1:{self.port}", f"localhost:{self.port}"))

    def serve(self) -> None:
        """Answer until `close` is called, or an interrupt."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ReportServer:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, text: int, query: int) -> dict[str, Any]:
        """One query's rows in every run, as the page's script reads them.

        Raises:
            LookupError: there is no such text or query.
        """
        keys = self.report.keys
        if not 0 <= text < len(keys) or not keys[text] or not 0 <= query < keys[text][0].length:
            raise LookupError("there is no such text or token")
        shown = self.report.detail.places(self.report.layers, self.report.heads)
        with self._lock, torch.inference_mode():
            return {"runs": [packed_rows(kept.pack([query], *shown)) for kept in keys[text]]}


class _Handler(BaseHTTPRequestHandler):
    """See Note: [Who may ask]."""

    server_of: ReportServer
    timeout = _SECONDS
    protocol_version = "HTTP/1.1"
    server_version = "attnrb"
    sys_version = ""

    def do_GET(self) -> None:
        served = self.server_of
        if self.headers.get_all("Host") != [host for host in served.hosts if host == self.headers.get("Host")]:
            self._answer(HTTPStatus.FORBIDDEN, b"this server answers requests for 127.0.0.1 alone", "text/plain")
            return
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._answer(HTTPStatus.FORBIDDEN, b"this server answers its own page alone", "text/plain")
            return
        asked = urlsplit(self.path)
        if asked.path == "/" and not asked.query:
            self._answer(HTTPStatus.OK, served._page, "text/html; charset=utf-8")
        elif asked.path == "/row":
            self._row(asked.query)
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there are / and /row", "text/plain")

    def _row(self, query: str) -> None:
        found = _ASKED.fullmatch(query)
        if found is None:
            self._answer(HTTPStatus.BAD_REQUEST, b"expected text=NUMBER&query=NUMBER", "text/plain")
            return
        try:
            rows = self.server_of.rows(int(found[1]), int(found[2]))
        except LookupError as error:
            self._answer(HTTPStatus.NOT_FOUND, str(error).encode(), "text/plain")
            return
        self._answer(HTTPStatus.OK, json.dumps(rows).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: requests are those of one page."""

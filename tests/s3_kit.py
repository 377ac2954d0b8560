"""An HTTP proxy in front of an S3 server that injects faults: answers lost, cut short, or given in the server's place."""

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """The part of a request that decides whether a fault applies."""

    method: str
    path: str
    headers: http.client.HTTPMessage


@dataclass(frozen=True)
class Answer:
    """An answer given in the server's place; if `code` is set, its body is an S3 error document."""

    status: int
    code: str = ""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def content(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>m</Message></Error>".encode() if self.code else self.body


@dataclass
class FaultyProxy:
    """The faults to inject: each is used up by the first request that matches it; all other requests pass.

    `lose`: the server acts, but its answer is lost. `cut`: only the first `at` bytes of the body arrive.
    `answer`: the server never sees the request."""

    address: str
    faults: list[tuple[Callable[[Request], bool], "int | Answer"]] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lose(self, matches: Callable[[Request], bool], times: int = 1) -> None:
        self.cut(matches, at=-1, times=times)

    def cut(self, matches: Callable[[Request], bool], *, at: int, times: int = 1) -> None:
        self.faults += [(matches, at)] * times

    def answer(self, matches: Callable[[Request], bool], answer: Answer, times: int = 1) -> None:
        self.faults += [(matches, answer)] * times

    def fault_for(self, request: Request) -> "int | Answer | None":
        with self.lock:
            self.seen.append(request)
            for index, (matches, fault) in enumerate(self.faults):
                if matches(request):
                    del self.faults[index]
                    return fault
        return None


def is_method(*methods: str) -> Callable[[Request], bool]:
    return lambda request: request.method in methods


@contextlib.contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """Run a proxy to `endpoint` on a free port."""
    target = urlsplit(endpoint)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # with 1.0, boto3 waits one second for "100 Continue"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault_for(Request(self.command, self.path, self.headers))
            if isinstance(fault, Answer):
                content = fault.content()
                self.respond(fault.status, {"Content-Length": str(len(content))} | fault.headers, content)
                return
            upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                content, headers = answer.read(), dict(answer.getheaders())
            finally:
                upstream.close()
            if self.command != "HEAD":
                headers.pop("Transfer-Encoding", None)
                headers["Content-Length"] = str(len(content))
            if fault is None:
                self.respond(answer.status, headers, content)
            elif fault >= 0:
                self.respond(answer.status, headers, content[:fault])
            self.close_connection = True

        def respond(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() != "connection":
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """Stay silent: the server behind the proxy was killed, or the client has gone."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()

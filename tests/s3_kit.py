"""A wire to an S3 server that loses answers, cuts them short or answers for it: what networks do, one request at a time."""

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What a fault looks at."""

    method: str
    path: str
    headers: http.client.HTTPMessage


@dataclass(frozen=True)
class Answer:
    """In place of the server's; `body` is an S3 error document when `code` is given."""

    status: int
    code: str = ""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def whole_body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>m</Message></Error>".encode() if self.code else self.body


@dataclass
class Wire:
    """The faults to come, used up one after the other by the requests that match; other requests pass.

    `lose`: the server acts, its answer is lost. `cut`: only so many bytes of the body arrive. `answer`: the server hears
    nothing of it."""

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
def wire_to(endpoint: str) -> Iterator[Wire]:
    """A wire to `endpoint` on a port of its own."""
    target = urlsplit(endpoint)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # with 1.0 boto3 waits a second for "100 Continue"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = wire.fault_for(Request(self.command, self.path, self.headers))
            if isinstance(fault, Answer):
                content = fault.whole_body()
                self.give(fault.status, {"Content-Length": str(len(content))} | fault.headers, content)
                return
            there = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            try:
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        there.putheader(name, value)
                there.endheaders(body)
                answer = there.getresponse()
                content, headers = answer.read(), dict(answer.getheaders())
            finally:
                there.close()
            if self.command != "HEAD":
                headers.pop("Transfer-Encoding", None)
                headers["Content-Length"] = str(len(content))
            if fault is None:
                self.give(answer.status, headers, content)
            elif fault >= 0:
                self.give(answer.status, headers, content[:fault])
            self.close_connection = True

        def give(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() != "connection":
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """The server at the other end was killed, or the client has gone: the wire breaks without words."""

    server = Server(("127.0.0.1", 0), Handler)
    wire = Wire(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield wire
    finally:
        server.shutdown()
        server.server_close()

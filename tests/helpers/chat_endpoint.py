"""An endpoint of OpenAI's kind on this machine, which writes down what it is asked and answers as a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

Reply = tuple[int, dict[str, str], str]


@dataclass
class Endpoint:
    """A running endpoint; ``asked`` are the bodies of all requests, ``headers`` what came with them."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    closed: Event = field(default_factory=Event)

    def texts(self) -> list[str]:
        """Return the words of all questions."""
        return [part["text"] for body in self.asked for part in body["messages"][0]["content"] if "text" in part]


def said(text: str | None) -> Reply:
    """Return a chat completion with this content."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def endpoint(answer: Callable[[Endpoint, dict[str, Any]], Reply | None]) -> Iterator[Endpoint]:
    """Run an endpoint that replies with what ``answer`` returns; None: it stays silent until the test is over."""
    running, lock = Endpoint(), Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running.asked.append(body)
                running.headers.append(dict(self.headers))
                reply = answer(running, body)
            if reply is None:
                running.closed.wait(30)
                return
            status, headers, text = reply
            data = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield running
    finally:
        running.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()

"""A chat endpoint on 127.0.0.1 that can also be slow, rude, wrong or gone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def said(text: str | None, **more: Any) -> Reply:
    """A proper answer."""
    message = {"role": "assistant", "content": text, **more}
    body = {
        "choices": [{"message": message, "finish_reason": more.pop("finish", "stop")}],
        "usage": {"prompt_tokens": 9},
    }
    return 200, {}, json.dumps(body).encode()


def failed(code: int, text: str = "", **headers: str) -> Reply:
    """An HTTP error."""
    return code, {k.replace("_", "-"): v for k, v in headers.items()}, text.encode()


def longest(question: dict[str, Any]) -> Reply:
    """A judge that prefers the longer response, whatever its place."""
    shown = json.loads(question["messages"][-1]["content"])
    a, b = len(shown["response A"]), len(shown["response B"])
    return said("A" if a > b else "B" if b > a else "C")


class Chat:
    """What the server was asked, and how it answers: `script` first, one reply a request, then `answer`."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply] = longest) -> None:
        self.answer = answer
        self.script: list[Reply] = []
        self.delay = 0.0
        self.drip = 0.0
        self.asked: list[tuple[float, str, dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(chat: Chat) -> Iterator[str]:
    """Serve until the block ends; gives the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with chat.lock:
                chat.asked.append((time.monotonic(), self.path, dict(self.headers), content))
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
                code, headers, body = chat.script.pop(0) if chat.script else chat.answer(content)
            time.sleep(chat.delay)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for start in range(0, len(body), 8) if chat.drip else ():
                    self.wfile.write(body[start : start + 8])
                    time.sleep(chat.drip)
                if not chat.drip:
                    self.wfile.write(body)
            with chat.lock:
                chat.at_once -= 1

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()

"""A chat endpoint that speaks OpenAI's protocol: bounded retries, a deadline per call, a key that is never kept."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.message import Message
from typing import Any

from counterpoise.checkpoints.hashing import in_background
from counterpoise.records import Progress, Store, digest

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may well be answered the next time
LARGEST = 8 << 20  # bytes of an answer
SECRET = 8  # characters of a key from which on it is one; servers at home take "x" or "EMPTY", which answers may hold
MOST_TOKENS = 10**12


class EndpointError(OSError):
    """The endpoint gave no usable answer; the message says what it did and what to do."""


Chat = tuple[tuple[str, str], ...]
"""Role and text of each message."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, whom, and how patiently.

    Attributes:
        base_url: up to and without /chat/completions, such as http://127.0.0.1:8000/v1.
        key_variable: the environment variable that holds the key; "" or an unset one sends none. The key is read at each
            call and stands in no attribute, message or file, also where the server repeats it (from 8 characters on).
        timeout: seconds for one whole call: name, connection, headers and body, however slowly they drip.
        attempts: calls in all before giving up.
        backoff: seconds before the second attempt; doubled before each further one.
        longest_wait: seconds; a server that asks for a longer pause (Retry-After) ends the run instead.
        temperature, max_tokens: sent as they are; None leaves the field out, for servers that refuse it.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0
    temperature: float | None = 0.0
    max_tokens: int | None = 512

    def __post_init__(self) -> None:
        if self.key_variable and not self.key_variable.isidentifier():
            raise ValueError("key variable: expected the name of an environment variable, not the key itself")
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base URL: expected http(s)://host/path, found {url.scheme or 'no scheme'}")
        if url.username or url.password or url.query:
            raise ValueError("base URL: expected no user, password or query in it, since it is stored with the results")
        if url.scheme == "http" and url.hostname not in ("127.0.0.1", "localhost", "::1") and self._key():
            raise ValueError(
                f"base URL: {url.hostname} would get the key of {self.key_variable} unencrypted; use https, or "
                "name no key variable (--key-variable '') when the server needs none"
            )
        if self.attempts < 1 or self.timeout <= 0:
            raise ValueError(f"expected attempts >= 1 and timeout > 0, found {self.attempts} and {self.timeout}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an answer, for the key of a cache."""
        keys = ("base_url", "model", "temperature", "max_tokens")
        return {k: getattr(self, k) for k in keys} | {"base_url": self.base_url.rstrip("/")}

    def ask(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> dict[str, Any]:
        """The answer to a chat: {"text", "finish", "refusal", "usage"}.

        Args:
            stop: once set, no further attempt is made.

        Raises:
            EndpointError: no usable answer in `attempts` calls, or one that would not change (a wrong key or model).
        """
        trouble, pause, stop = "", 0.0, stop or threading.Event()
        for attempt in range(self.attempts):
            if attempt and stop.wait(max(pause, self.backoff * 2 ** (attempt - 1))):
                raise self._end(f"stopped after {attempt} attempts, the last: {trouble}")
            try:
                code, headers, body = self._post(messages)
                if 200 <= code < 300:
                    return self._reading(body)
            except (_Rubbish, http.client.HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                slow = isinstance(error, TimeoutError) or isinstance(reason, TimeoutError)
                trouble, pause = f"no answer in {self.timeout:g} s" if slow else self._clean(str(reason)), 0.0
            else:
                trouble, pause = self._told(code, headers, body)
        raise self._end(f"{self.attempts} attempts, the last: {trouble}; is the server up, and the base URL right?")

    def ask_all(
        self,
        chats: Sequence[Chat],
        store: Store,
        what: str,
        *,
        concurrency: int = 4,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """The answer to each chat; equal ones are asked once, and what is in the store never again.

        Args:
            what: names the kind of answer in the store.
            concurrency: calls under way at once.
            progress: called with (done, total) answers.

        Raises:
            EndpointError: see `ask`; answers that came before it are in the store.
        """
        answers, stop = {}, threading.Event()

        def answer(chat: Chat) -> dict[str, Any]:
            messages = [{"role": role, "content": content} for role, content in chat]
            return store.once(self.key(chat, what), lambda: self.ask(messages, stop))

        with ThreadPoolExecutor(concurrency) as pool:
            waiting = {pool.submit(answer, chat): chat for chat in dict.fromkeys(chats)}
            try:
                for done, future in enumerate(as_completed(waiting), start=1):
                    answers[waiting[future]] = future.result()
                    if progress is not None:
                        progress(done, len(waiting))
            except BaseException:
                stop.set()  # those under way make no further attempt
                pool.shutdown(cancel_futures=True)
                raise
        return [answers[chat] for chat in chats]

    def key(self, chat: Chat, what: str) -> dict[str, Any]:
        """Of an answer in a store."""
        messages = [{"role": role, "content": content} for role, content in chat]
        return {"what": what, "endpoint": self.identity, "chat": digest(messages)}

    def _post(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, Message, bytes]:
        """Status, headers and body, with the key taken out. The time limit is this thread's wait for another one: the
        library's own is for each single byte."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        body |= {k: v for k in ("temperature", "max_tokens") if (v := getattr(self, k)) is not None}
        headers = {"Content-Type": "application/json", "User-Agent": "counterpoise"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        line = _Line()

        def exchange() -> tuple[int, Message, bytes]:
            opener = urllib.request.build_opener(_NoRedirect, _Http(line), _Https(line))
            try:
                answer = opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                answer = error
            pieces, size = [], 0
            with answer:
                while piece := answer.read1(1 << 16):
                    pieces.append(piece)
                    size += len(piece)
                    if size > LARGEST:
                        raise _Rubbish(f"an answer of more than {LARGEST >> 20} MiB")
            return answer.status, answer.headers, b"".join(pieces)

        try:
            status, told, said = in_background(exchange).result(self.timeout)
        finally:
            line.cut()
        return status, told, said.replace(key.encode(), b"***") if len(key) >= SECRET else said

    def _reading(self, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
            choice = content["choices"][0]
            message = choice["message"]
            text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
            usage = content.get("usage")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Rubbish(f"an answer without choices[0].message: {body[:80]!r}") from None
        for what, value in (("content", text), ("finish_reason", finish)):
            if value is not None and not isinstance(value, str):
                raise _Rubbish(f"a message whose {what} is no text but {type(value).__name__}")
        counts = _counts({} if usage is None else usage)
        finish = None if finish is None else self._masked(finish)
        return {"text": self._masked(text or ""), "finish": finish, "refusal": bool(refusal), "usage": counts}

    def _told(self, code: int, headers: Message, said: bytes) -> tuple[str, float]:
        """What an HTTP error says and how long it asks to wait; one that would not change ends the run."""
        trouble = f"HTTP {code} {self._clean(said.decode(errors='replace'))[:300]}".strip()
        if code in (401, 403):
            state = "is set" if self._key() else "is not set"
            raise self._end(f"{trouble}; the key is read from {self.key_variable or 'no variable'}, which {state}")
        if code not in AGAIN:
            raise self._end(f"{trouble}; expected an OpenAI-compatible /chat/completions for the model {self.model!r}")
        pause = _retry_after(headers.get("Retry-After"))
        if pause > self.longest_wait:
            raise self._end(f"{trouble}; it asks to wait {pause:.0f} s, more than {self.longest_wait:g}; go on later")
        return trouble, pause

    def _end(self, why: str) -> EndpointError:
        return EndpointError(f"{self.base_url}: {why}")

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if key and not (key.isascii() and key.isprintable()):
            # Said here, since the http library would show the value it cannot send.
            raise ValueError(f"{self.key_variable}: expected a key of printable ASCII characters on one line")
        return key

    def _clean(self, text: str) -> str:
        """On one line, without the key."""
        return " ".join("".join(c if c.isprintable() else " " for c in self._masked(text)).split())

    def _masked(self, text: str) -> str:
        """Without the key, should the server repeat it."""
        key = self._key()
        return text.replace(key, "***") if len(key) >= SECRET else text


class _Rubbish(Exception):
    """An answer that is not what the protocol promises."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Line:
    """The connections of one call, so that they can be cut from another thread."""

    def __init__(self) -> None:
        self.lock, self.over = threading.Lock(), False
        self.ends: list[socket.socket] = []

    def add(self, made: socket.socket) -> None:
        """Keep another end of a connection: the library's own may be wrapped, or put aside, by then."""
        with self.lock:
            if self.over:
                raise TimeoutError
            self.ends.append(socket.socket(fileno=os.dup(made.fileno())))

    def cut(self) -> None:
        """End all connections, now and later."""
        with self.lock:
            self.over = True
            for end in self.ends:
                with end, contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class _Cut:
    """A handler whose connections a line holds."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self.line = line

    def do_open(self, http_class: Any, request: urllib.request.Request, **settings: Any) -> Any:
        def made(*args: Any, **more: Any) -> Any:
            connection = http_class(*args, **more)
            connect = connection.connect

            def connecting() -> None:
                connect()
                self.line.add(connection.sock)

            connection.connect = connecting
            return connection

        return super().do_open(made, request, **settings)  # type: ignore[misc]


class _Http(_Cut, urllib.request.HTTPHandler):  # type: ignore[misc]
    pass


class _Https(_Cut, urllib.request.HTTPSHandler):  # type: ignore[misc]
    pass


def _counts(usage: Any) -> dict[str, int]:
    found = (
        {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
        if isinstance(usage, dict)
        else {"usage": usage}
    )
    for name, count in found.items():
        whole = isinstance(count, int) or (isinstance(count, float) and count.is_integer())
        if count is not None and (isinstance(count, bool) or not whole or not 0 <= count <= MOST_TOKENS):
            raise _Rubbish(f"an answer whose usage holds {name} = {str(count)[:40]}, no number of tokens")
    return {k: int(v or 0) for k, v in found.items()}


def _retry_after(value: str | None) -> float:
    """Seconds, from a number or a date; 0 when there is none that can be read."""
    if value:
        with contextlib.suppress(ValueError):
            return max(0.0, float(value))
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0

"""A small server that speaks the OpenAI-compatible protocol, for the real client."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
Body = dict[str, Any]


@dataclass
class Server:
    """Records what it was asked; `answer` gives (status, JSON or bytes) for the body of a request."""

    url: str = ""
    answer: Callable[[Body], Answer] = lambda body: answered(body)
    bodies: list[Body] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


def text_of(body: Body) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


def choice_of(body: Body, number: int, **changes: Any) -> Body:
    """A choice of two tokens, whose log p are -0.5 and -(number + 1)."""
    text, values = f"{text_of(body)} {number}", [-0.5, -(number + 1.0)]
    choice: Body = {"index": number, "finish_reason": "length" if number % 2 else "stop", "logprobs": None}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": text}
        if body.get("logprobs"):
            content: list[Body] = [
                {"token": "x", "logprob": value, "bytes": None, "top_logprobs": []} for value in values
            ]
            choice["logprobs"] = {"content": content, "refusal": None}
    else:
        choice["text"] = text
        if body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": values, "tokens": ["x", "y"], "top_logprobs": [], "text_offset": []}
    return choice | changes


def answered(body: Body, count: int | None = None, **changes: Any) -> Answer:
    count = body["n"] if count is None else count
    kind = "chat.completion" if "messages" in body else "text_completion"
    choices = [choice_of(body, number, **changes) for number in range(count)]
    return 200, {"id": "x", "object": kind, "created": 0, "model": body["model"], "choices": choices}


def refused(message: str, status: int = 400) -> Answer:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}}


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a port of its own."""
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.bodies.append(body)
                state.paths.append(self.path)
                state.keys.append(self.headers["Authorization"])
                state.running += 1
                state.most_running = max(state.most_running, state.running)
            status, content = state.answer(body)
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            with lock:
                state.running -= 1
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(payload)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        listening.shutdown()
        thread.join()

"""`infer-align chat`: a conversation in the terminal that shows the scores of the candidates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.errors import AlignError, quote
from infer_align.upstream.sse import EventParser, is_done

OUT = Console()
# Bytes of an event that a message shows.
EXCERPT = 200
TIMEOUT = httpx2.Timeout(600, connect=5)


class Chat:
    """One conversation with a running server.

    Args:
        base_url: The base URL of the API, such as "http://127.0.0.1:8000/v1".
        model: The model's name; None for the first model that the server lists.
        fields: Further fields of every request, such as `align`; None leaves a field out.
        system: The system message, if there is one.
        api_key_env: The environment variable that may hold the API key.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        fields: Mapping[str, Any],
        system: str | None,
        api_key_env: str,
    ) -> None:
        key = os.environ.get(api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(
            base_url=base_url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT
        )
        self._model = model
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._messages: list[dict[str, Any]] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def send_once(self, message: str) -> int:
        """Send one message and print the answer; return the exit status."""
        self._send(message)
        return 0

    def loop(self) -> int:
        """Read messages and print answers until the end of input; return the exit status."""
        OUT.print("[dim]Ctrl-D ends the conversation.[/]")
        while True:
            try:
                message = OUT.input("[bold cyan]you[/] ")
            except EOFError:
                return 0
            if not message.strip():
                continue
            try:
                self._send(message)
            except AlignError as error:
                # Drop the message and continue the conversation without it.
                self._messages.pop()
                OUT.print(f"[red]{escape(error.message)}[/]", highlight=False)

    def _send(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        answer = ""
        report = None
        for chunk in self._chunks():
            report = chunk.get("align", report)
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                answer += text
                OUT.print(text, end="", markup=False, highlight=False)
        OUT.print()
        self._messages.append({"role": "assistant", "content": answer})
        if report:
            _print_report(report)

    def _chunks(self) -> Iterator[dict[str, Any]]:
        """Send the conversation and yield the chunks of the answer.

        Raises:
            AlignError: The server cannot be reached, or it answers with an error.
        """
        try:
            self._model = self._model or self._first_model()
            body: dict[str, Any] = {
                "messages": self._messages,
                "stream": True,
                "model": self._model,
            }
            body |= self._fields
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    response.raise_for_status()
                yield from _parse_chunks(response)
        except httpx2.HTTPStatusError as error:
            raise AlignError(_error_message(error.response)) from None
        except httpx2.HTTPError as error:
            raise AlignError(
                f"{self._http.base_url}: {error}; is the server running? "
                "Start it with: infer-align serve"
            ) from None

    def _first_model(self) -> str:
        response = self._http.get("models").raise_for_status()
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise AlignError(
                f"{response.url}: the answer is no list of models; is it the URL of an OpenAI API, "
                "such as http://127.0.0.1:8000/v1? Otherwise name the model with --model."
            ) from None


def _parse_chunks(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    for data in _events(response):
        if is_done(data):
            continue
        yield _parse_chunk(data)


def _parse_chunk(data: bytes) -> dict[str, Any]:
    """Return the chunk in the data of an event.

    Raises:
        AlignError: it is an error, or no chunk.
    """
    try:
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise AlignError(str(chunk["error"]["message"]))
        chunk["choices"] = [choice for choice in chunk["choices"] if choice.get("delta")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        excerpt = data[:EXCERPT].decode(errors="replace")
        raise AlignError(
            f"the server sent {quote(excerpt)} in a stream, which is no chunk of a chat completion"
        ) from None
    return chunk


def _events(response: httpx2.Response) -> Iterator[bytes]:
    parser = EventParser()
    for received in response.iter_bytes():
        yield from parser.feed(received)
    yield from parser.end()


def _error_message(response: httpx2.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} from {response.url}"


def _print_report(report: Mapping[str, Any]) -> None:
    OUT.print(f"[dim]{escape(report['reason'])}[/]", highlight=False)
    rewards = list(report["candidates"][0]["scores"])
    if not rewards:
        return
    table = Table("candidate", "objective", *rewards, "tokens", box=None, header_style="dim")
    for candidate in report["candidates"]:
        cells = [str(candidate["index"]), _number(candidate["objective"])]
        for name in rewards:
            score = candidate["scores"][name]
            cells.append(_number(score["value"], score["std"]))
        cells.append(str(candidate["completion_tokens"]))
        style = "bold green" if candidate["index"] == report["selected"] else None
        table.add_row(*cells, style=style)
    OUT.print(table)


def _number(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread else "")

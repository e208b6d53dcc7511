"""`infer-align chat`: a conversation in the terminal, with the scores of the candidates behind each answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.errors import AlignError

OUT = Console()


class Chat:
    """One conversation with a running server."""

    def __init__(
        self,
        base_url: str,
        model: str | None,
        align: Mapping[str, Any],
        system: str | None,
        api_key_env: str,
    ) -> None:
        key = os.environ.get(api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=base_url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(600, connect=5),
        )
        self._model = model
        self._align = align
        self._messages: list[dict[str, Any]] = (
            [{"role": "system", "content": system}] if system else []
        )

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def once(self, message: str) -> int:
        """One question, one answer."""
        self._ask(message)
        return 0

    def loop(self) -> int:
        """Until the end of input."""
        OUT.print("[dim]Ctrl-D ends the conversation.[/]")
        while True:
            try:
                message = OUT.input("[bold cyan]you[/] ")
            except EOFError:
                return 0
            if not message.strip():
                continue
            try:
                self._ask(message)
            except AlignError as error:  # the conversation goes on without this turn
                self._messages.pop()
                OUT.print(f"[red]{escape(error.message)}[/]", highlight=False)

    def _ask(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        answer, report = "", None
        for chunk in self._stream():
            report = chunk.get("align", report)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                answer += piece
                OUT.print(piece, end="", markup=False, highlight=False)
        OUT.print()
        self._messages.append({"role": "assistant", "content": answer})
        if report:
            _print_report(report)

    def _stream(self) -> Iterator[dict[str, Any]]:
        body: dict[str, Any] = {"messages": self._messages, "stream": True}
        if self._align:
            body["align"] = self._align
        try:
            body["model"] = self._model = (
                self._model or self._http.get("models").raise_for_status().json()["data"][0]["id"]
            )
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise AlignError(chunk["error"]["message"])
                        yield chunk
        except httpx.HTTPStatusError as error:
            raise AlignError(_message(error.response)) from None
        except httpx.HTTPError as error:
            raise AlignError(
                f"{self._http.base_url}: {error}; is the server running? Start it with: infer-align serve"
            ) from None


def _message(response: httpx.Response) -> str:
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
        chosen = "[bold green]" if candidate["index"] == report["selected"] else ""
        scores = [
            _number(candidate["scores"][name]["value"], candidate["scores"][name]["std"])
            for name in rewards
        ]
        cells = [
            str(candidate["index"]),
            _number(candidate["objective"]),
            *scores,
            str(candidate["completion_tokens"]),
        ]
        table.add_row(*(chosen + cell for cell in cells))
    OUT.print(table)


def _number(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread else "")

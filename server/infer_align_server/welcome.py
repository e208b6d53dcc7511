"""The screen that `infer-align serve` prints when it is ready: what, where, how, and what next."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from infer_align.config import Limits
from infer_align.methods.dpa import Prompting
from infer_align_server.availability import Availability, availability
from infer_align_server.service import Service
from infer_align_server.sharing import Sharing

# Names of further models that one screen has room for.
MAX_NAMES = 8
QUESTION = "Why is the sky blue?"
BEGINNING = "The sky is blue because"
DIRECTIONS = (
    "dpa and rps change answers only if the model was trained on directions. If it was, set "
    "[dpa] trained = true."
)


def print_welcome(service: Service, url: str, seconds: float, console: Console) -> None:
    """Print the screen.

    Args:
        service: The service that is ready.
        url: The URL of the server, without a path.
        seconds: The time since the start of the process' loading.
        console: Where to print.
    """
    model = escape(service.model or "the models of its upstream")
    first = f"[bold]infer-align[/] serves [bold]{model}[/] at {url}/v1"
    console.print(f"{first} (ready after {seconds:.1f} s)", highlight=False, soft_wrap=True)
    for title, text in _rows(service, url):
        # Further lines are aligned with the first one.
        lines = text.replace("\n", f"\n{'':12}")
        row = f"  [dim]{title:<9}[/] {escape(lines)}"
        console.print(row, highlight=False, soft_wrap=True)


def _rows(service: Service, url: str) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each part of the screen."""
    engine = service.engine
    yield from _facts(service)
    yield from _methods(service)
    if not service.config.methods.get(Prompting).trained:
        yield "note", DIRECTIONS
    for note in engine.notes:
        yield "note", note
    for name, reward in service.rewards.items():
        for warning in reward.warnings:
            yield "note", f"[rewards.{name}] {warning}"
    for warning in service.warnings:
        yield "warning", warning
    yield "try", _example(service, url)
    server = service.config.server
    if server.playground:
        yield "open", f"{url}/ in a browser: the playground"
    reference = f"{url}/docs" if server.api_docs else f"{url}/openapi.json"
    yield "docs", f"docs/api.md, docs/configuration.md; {reference}"


def _facts(service: Service) -> Iterator[tuple[str, str]]:
    """Yield what answers: the engine, its models and the workers."""
    engine = service.engine
    length = f", context of {engine.context_length:,} tokens" if engine.context_length else ""
    yield "engine", f"{service.config.engine_kind}{length}"
    models = service.models()
    if len(models) > 1:
        yield "models", _list_names(models)
    if service.sharing is not None:
        yield "workers", _workers(service.sharing, service.config.limits)


def _workers(sharing: Sharing, limits: Limits) -> str:
    share = sharing.limits(limits)
    return (
        f"{sharing.workers} processes; each runs {share.max_running} requests and queues "
        f"{share.max_queue}, its share of [limits]; rates and budgets are counted together"
    )


def _list_names(names: list[str]) -> str:
    text = ", ".join(names[:MAX_NAMES])
    hidden = len(names) - MAX_NAMES
    return f"{text} and {hidden} more: GET /v1/models" if hidden > 0 else text


def _methods(service: Service) -> Iterator[tuple[str, str]]:
    """Yield the methods that can be asked for, then the others with what they lack."""
    methods = availability(service)
    usable = [name for name, method in methods.items() if method.reason is None]
    yield "align", ", ".join(usable) or "no method can be asked for"
    by_reason: dict[Availability, list[str]] = {}
    for name, method in methods.items():
        if method.reason is not None:
            by_reason.setdefault(method, []).append(name)
    for method, names in by_reason.items():
        yield "not yet", _mended(f"{', '.join(names)}: {method.reason}", method.fix)
    by_note: dict[Availability, list[str]] = {}
    for name, method in methods.items():
        if method.note:
            by_note.setdefault(method, []).append(name)
    for method, names in by_note.items():
        yield "note", _mended(f"{', '.join(names)}: {method.note}", method.fix)


def _mended(text: str, fix: str) -> str:
    """Return a text with the lines of configuration that would mend it."""
    if not fix:
        return text
    lines = "\n".join(f"    {line}" for line in fix.splitlines())
    return f"{text}; or add to the configuration:\n{lines}"


def _example(service: Service, url: str) -> str:
    body: dict[str, object] = {"model": service.model} if service.model else {}
    route = "chat/completions"
    if service.engine.reads_chats:
        body["messages"] = [{"role": "user", "content": QUESTION}]
    else:
        route, body["prompt"] = "completions", BEGINNING
    body["max_tokens"] = 60
    if service.config.rewards:
        body["align"] = {"best_of_n": {"n": 4}}
    # A single quote would end the argument of the shell.
    content = json.dumps(body).replace("'", "\\u0027")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if service.needs_key else ""
    return f"curl {url}/v1/{route}{key} -H 'Content-Type: application/json' -d '{content}'"

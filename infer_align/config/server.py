"""`[server]` and `[limits]`: the settings of the process that serves."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator

from infer_align.decoding.params import MAX_COUNT

# What a browser sends: no path. A slash at the end is read over. Extensions have schemes of their
# own.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+/?")


def _check_origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(
            'an origin with its scheme and without a path, such as "https://app.example.com", or '
            '"*" for all; another text never equals what a browser sends'
        )
    return origin


@dataclass(frozen=True, slots=True)
class Server:
    """`[server]`: the address to listen on, the API keys, and how answers are sent."""

    host: str = field(
        default="127.0.0.1", metadata={"min_length": 1, "description": "Address to listen on."}
    )
    port: int = field(
        default=8000,
        metadata={"ge": 0, "le": 65535, "description": "Port to listen on; 0 takes a free port."},
    )
    workers: int = field(
        default=1,
        metadata={
            "ge": 1,
            "le": 256,
            "description": "Processes that serve, for engines that hold no model: `openai` and "
            "`fake`. Rates and token budgets are counted together; each process admits its share "
            "of max_running, max_running_tokens and max_queue.",
        },
    )
    worker_timeout_seconds: float = field(
        default=60.0,
        metadata={
            "ge": 1,
            "description": "With several workers: one that serves, and whose event loop does not "
            "answer for so many seconds, is killed and replaced.",
        },
    )
    api_keys_env: str | None = field(
        default=None,
        metadata={
            "min_length": 1,
            "description": "Environment variable that holds the accepted API keys, separated by "
            "commas; without it, no key is required.",
        },
    )
    api_keys_file: str | None = field(
        default=None,
        metadata={
            "min_length": 1,
            "description": "TOML file of named API keys, as hashes, with their scopes. It is read "
            "again when it changes and on SIGHUP, so keys rotate without a restart. "
            "`infer-align keys new` prints an entry.",
        },
    )
    allowed_origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = field(
        default=(),
        metadata={
            "description": "Origins of the web pages whose scripts may call this server, such as "
            '"https://app.example.com"; "*" allows all. By default, no page of another origin may.'
        },
    )
    served_name: str | None = field(
        default=None,
        metadata={
            "min_length": 1,
            "description": "Name of the model in the API; default: the engine's name.",
        },
    )
    default_rewards: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "description": "{reward name: weight} for requests that name no rewards; default: "
            "every single-objective reward that needs no engine, weight 1 each, or else every one "
            "that reads with an engine. Judges and likelihoods score only if they are named."
        },
    )
    default_max_tokens: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "le": MAX_COUNT,
            "description": "Maximum number of tokens of an answer whose request names none. It "
            "also bounds what such a request reserves. Default: what fits the context.",
        },
    )
    keepalive_seconds: float = field(
        default=10.0,
        metadata={
            "gt": 0,
            "description": "Seconds without output after which a stream sends an SSE comment; "
            "until then a failure is answered with its own HTTP status.",
        },
    )
    honour_client_timeout: bool = field(
        default=True,
        metadata={
            "description": "Use the timeout that OpenAI's SDKs announce as the deadline of a "
            "request that sets none."
        },
    )
    drain_seconds: float = field(
        default=30.0,
        metadata={"ge": 0, "description": "Seconds that running requests may take after SIGTERM."},
    )
    playground: bool = field(
        default=True,
        metadata={"description": "Serve the playground, a page for the browser, at `/`."},
    )
    api_docs: bool = field(
        default=True,
        metadata={"description": "Serve the reference of the API, a page for people, at `/docs`."},
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata={"description": "Lowest level of log lines to write."}
    )


@dataclass(frozen=True, slots=True)
class Telemetry:
    """`[telemetry]`: traces and evaluation events that are sent to an OpenTelemetry collector."""

    endpoint: str | None = field(
        default=None,
        metadata={
            "min_length": 1,
            "description": "URL of a collector that speaks OTLP over HTTP, such as "
            '"http://localhost:4318". Without it nothing is traced.',
        },
    )
    headers_env: str | None = field(
        default=None,
        metadata={
            "description": "Environment variable that holds headers for the collector, as "
            "`name=value` separated by commas, such as a key."
        },
    )
    service_name: str = field(
        default="infer-align", metadata={"description": "Name of this server in traces."}
    )
    sample_ratio: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Share of the requests that are traced. A request that continues a "
            "trace is traced if the caller traces it.",
        },
    )
    capture_content: bool = field(
        default=False,
        metadata={
            "description": "Also send the text of prompts and answers. Without it, no text of a "
            "user leaves this server."
        },
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """`[limits]`: bounds on one request, on one API key, and on all requests together."""

    max_candidates: int = field(
        default=128,
        metadata={"ge": 1, "description": "Maximum number of candidates of one request."},
    )
    max_documents: int = field(
        default=1000,
        metadata={
            "ge": 1,
            "description": "Maximum number of documents of one request to /v1/rerank.",
        },
    )
    max_completion_tokens: int = field(
        default=131_072,
        metadata={
            "ge": 1,
            "description": "Maximum worst case of one request in tokens: candidates x maximum "
            "tokens of each, what judges sample, and what the contexts of guidance read.",
        },
    )
    max_running: int = field(
        default=64, metadata={"ge": 1, "description": "Maximum number of requests running at once."}
    )
    max_running_tokens: int = field(
        default=1_048_576,
        metadata={"ge": 1, "description": "Maximum sum of the running requests' worst cases."},
    )
    max_queue: int = field(
        default=256,
        metadata={
            "ge": 0,
            "description": "Maximum number of waiting requests; the next one gets a 429.",
        },
    )
    max_body_bytes: int = field(
        default=4 * 1024 * 1024,
        metadata={"ge": 1, "description": "Maximum size of a request body in bytes."},
    )
    max_upload_bytes: int = field(
        default=512 * 1024 * 1024,
        metadata={
            "ge": 1,
            "description": "Maximum size in bytes of a body that is passed on piece by piece and "
            "is not JSON, such as a file or a recording.",
        },
    )
    requests_per_minute: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "Requests per minute and API key, or per address without keys; "
            "0 for no limit.",
        },
    )
    candidate_tokens_per_minute: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "Tokens per minute and API key, or per address without keys: sampled, "
            "read in the contexts of guidance, and read by engines for rewards. A request reserves "
            "its worst case and gets back what it did not use; 0 for no limit.",
        },
    )
    storage_env: str | None = field(
        default=None,
        metadata={
            "description": "Environment variable that holds the URL of a PostgreSQL database, such "
            "as postgresql+asyncpg://user:password@host/database. All servers with the same "
            "database count the limits per minute together. Without it each server counts alone."
        },
    )
    storage_timeout_seconds: float = field(
        default=0.5,
        metadata={"gt": 0, "description": "Longest time to wait for that database."},
    )
    storage_failure: Literal["count_alone", "refuse"] = field(
        default="count_alone",
        metadata={
            "description": "What happens while that database does not answer: `count_alone` lets "
            "each server count by itself, `refuse` answers 503."
        },
    )

    def numbers(self) -> dict[str, int]:
        """Return the limits by name, without the place where they are counted."""
        limits: dict[str, int] = {}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int):
                limits[name] = value
        return limits

"""Any OpenAI-compatible server as the engine.

    start        ─▶ the list of models             models.py
    check        ─▶ features that a request needs  features.py, probe.py
    sample       ─▶ one draw in a few calls        draws.py, batch.py, batch_size.py
                 ─▶ one draw token by token        steering.py, steered.py, ways.py,
                    (vas, guidance)                contexts.py, context_reader.py,
                                                   answer_values.py, continuation.py
    read_labels  ─▶ top logprobs                   labels.py
    forward      ─▶ the upstream's own answer, unchanged

A request's body is sent as the client wrote it, and unknown fields of an answer are returned. The
package `infer_align.upstream` manages the hosts and sends the calls. Of a request, only the name of
the model decides which hosts may serve it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from infer_align.engines.openai.engine import OpenAIEngine
from infer_align.engines.openai.models import CONTEXT_LENGTH
from infer_align.engines.openai.probe import FEATURES
from infer_align.errors import ConfigError
from infer_align.upstream import Upstream

__all__ = ["OpenAI", "OpenAIEngine", "plugin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAI(Upstream):
    """Any OpenAI-compatible server, or several, that run the model."""

    holds_model: ClassVar[bool] = False
    model: str | None = field(
        default=None,
        metadata={
            "description": "Model of the upstreams. By default, every model that they list is "
            "served under its own name."
        },
    )
    n: Literal["auto", "native", "single"] = field(
        default="auto",
        metadata={
            "description": "Calls for several candidates. 'native': one call with n. "
            "'single': n calls. 'auto': native, and fewer per call if fewer come back."
        },
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "Maximum number of tokens of prompt and completion together. Default: "
            f"what the upstream reports, or {CONTEXT_LENGTH}.",
        },
    )
    probe: Literal["lazy", "start"] | bool = field(
        default="lazy",
        metadata={
            "description": "When to find out the features of the upstreams, with calls of a few "
            "tokens. 'lazy': when a request first needs one, for its model alone. 'start' or true: "
            "at the start, for the first models that are listed. false: never; `capabilities` "
            "counts."
        },
    )
    probe_seconds: float = field(
        default=20.0,
        metadata={"gt": 0, "description": "Timeout for the probes of a model that run together."},
    )
    capabilities: tuple[str, ...] = field(
        default=("completion", "seed", "logprobs", "tools", "structured", "n", "logit_bias"),
        metadata={
            "description": "Features of the upstreams if probe is false. "
            f"Possible are: {', '.join(FEATURES)}."
        },
    )
    routes: tuple[str, ...] = field(
        default=(
            "audio",
            "batches",
            "chat",
            "classify",
            "completions",
            "containers",
            "conversations",
            "detokenize",
            "embeddings",
            "files",
            "images",
            "messages",
            "moderations",
            "ocr",
            "pooling",
            "rerank",
            "responses",
            "score",
            "tokenize",
            "uploads",
            "vector_stores",
            "videos",
        ),
        metadata={
            "description": "Routes of the upstreams that are passed on, by the first part of their "
            "path below /v1. '*' passes on every route, also those that administrate the upstream."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "description": "Path or hub id of the tokenizer of the upstream's model. Required by "
            "vas and guidance."
        },
    )

    def load(self) -> OpenAIEngine:
        """Return the engine, without calling the upstreams.

        Raises:
            ConfigError: urls, key or capabilities are wrong.
        """
        unknown = sorted(set(self.capabilities) - set(FEATURES))
        if unknown:
            raise ConfigError(
                f"capabilities: {unknown[0]!r} is unknown; use any of {', '.join(FEATURES)}."
            )
        return OpenAIEngine(self)


plugin = OpenAI

"""Checks of a whole configuration: what its sections need together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer_align.config.model_path import check_model
from infer_align.config.sections import in_section
from infer_align.errors import ConfigError
from infer_align.upstream import Upstream

if TYPE_CHECKING:
    from infer_align.config.config import Config


def check_workers(config: Config) -> None:
    """Check that several processes can serve a configuration.

    Raises:
        ConfigError: An engine loads a model into the process, or a limit is too small to share.
    """
    workers = config.server.workers
    if workers == 1:
        return
    sections: dict[str, object] = {"engine": config.engine}
    sections |= {f"engines.{name}": section for name, section in config.engines.items()}
    for name, section in sections.items():
        if getattr(section, "holds_model", True):
            raise ConfigError(
                f"[server] workers = {workers}: the engine of [{name}] loads a model into the "
                "process, and each worker would load its own copy. Set workers = 1 and run one "
                "replica per GPU, such as with the chart deploy/helm/infer-align. For several "
                'gateway processes in front of it, use an engine of kind "openai".'
            )
    for name in ("max_running", "max_running_tokens"):
        limit = getattr(config.limits, name)
        if limit < workers:
            raise ConfigError(
                f"[limits] {name}: {limit} is fewer than [server] workers = {workers}, and each "
                f"worker admits its share; raise {name} or lower workers."
            )


def check_gpu_memory(config: Config) -> None:
    """Check that the engines on the same GPUs leave room for each other.

    Otherwise the last one to load would fail.

    Raises:
        ConfigError: Together they take more than the memory.
    """
    sections: dict[str, object] = {"engine": config.engine}
    sections |= {f"engines.{name}": section for name, section in config.engines.items()}
    sections |= {f"rewards.{name}": section for name, section in config.rewards.items()}
    shares: dict[str, float] = {}
    for name, section in sections.items():
        share = getattr(section, "memory_share", None)
        if share is not None:
            shares[name] = share
    total = sum(shares.values())
    if total > 1 + 1e-9:
        terms = " + ".join(f"[{name}] {share:.3g}" for name, share in shares.items())
        raise ConfigError(
            f"gpu_memory_utilization: the shares sum to {terms} = {total:.3g}, but the sum "
            "must be at most 1 (a section with several models takes its share once per model); "
            "lower the shares, or set kv_cache_memory_bytes instead."
        )


def check_models(config: Config) -> None:
    """Check the models of the engines that load one.

    Raises:
        ConfigError: a path holds no model; the message begins with the section.
    """
    sections: dict[str, object] = {"engine": config.engine}
    sections |= {f"engines.{name}": section for name, section in config.engines.items()}
    for path, section in sections.items():
        model = getattr(section, "model", None)
        if not isinstance(model, str) or isinstance(section, Upstream):
            continue
        try:
            check_model(model)
        except ConfigError as error:
            raise in_section(path, error) from None

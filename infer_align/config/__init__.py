"""Configuration of the process, and the plugins that it can name.

config = infer_align.config.load("infer-align.toml", ["server.port=9000"])
engine = config.load_engine()
"""

from infer_align.config.config import Config, load
from infer_align.config.server import Limits, Server, Telemetry
from infer_align.config.source import Choices, override

__all__ = ["Choices", "Config", "Limits", "Server", "Telemetry", "load", "override"]

"""Configuration of the process, and the plugins that it can name.

config = infer_align.config.load("infer-align.toml", ["server.port=9000"])
engine = config.load_engine()
"""

from infer_align.config.config import Config, load, override
from infer_align.config.server import Limits, Server

__all__ = ["Config", "Limits", "Server", "load", "override"]

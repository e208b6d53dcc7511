"""Configuration of the process, and the plugins that it can name.

config = infer_align.config.load("infer-align.toml", ["server.port=9000"])
engine = config.load_engine()
"""

from infer_align.config.config import Config, Limits, Server, load, override

__all__ = ["Config", "Limits", "Server", "load", "override"]

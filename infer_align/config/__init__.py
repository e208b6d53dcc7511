"""Configuration of the process: the TOML file, the parser of its sections, and the plugin registry."""

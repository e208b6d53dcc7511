"""A server that sends its traces to a collector in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infer_align import config as configuration
from tests.server.collector import Collector, collector
from tests.server.conftest import NUMBERS, Live, end, start

ConfigFile = Callable[[str], Path]
ROUTE = "POST /v1/chat/completions"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT = CALLER.split("-")[1:3]


@contextmanager
def traced(
    config_file: ConfigFile, text: str = NUMBERS, settings: str = ""
) -> Iterator[tuple[Live, Collector]]:
    """Serve with a collector of its own."""
    with collector() as receiver:
        section = f'\n[telemetry]\nendpoint = "{receiver.url}"\n{settings}\n'
        live = start(configuration.load(config_file(text + section)))
        try:
            yield live, receiver
        finally:
            end(live)


def flush(live: Live) -> None:
    assert live.service.tracing is not None
    live.service.tracing.flush()

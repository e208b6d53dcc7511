"""A server that outlives the process that starts it, so that several parts measure one engine.

An 8B model takes longer to start than a piece of the measurement may last. If the part that waits
for it runs out of time, the server goes on starting, and the next piece waits for the same one.

    python -m benchmarks.gpu.held_server begin [--tiny]
    python -m benchmarks.gpu.held_server start [--tiny]
    python -m benchmarks.gpu.held_server stop
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu.models import LARGE, TINY, Size, write_config, write_models
from benchmarks.serving.ports import free_port

DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "infer-align-measure-gpu"
STATE = "server.json"
LOG = "server.log"
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0
# Without torch.compile, whose time at the start does not fit.
GPU_OPTIONS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 256,
    "gpu_memory_utilization": 0.8,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
CPU_OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 26,
    "enforce_eager": True,
}
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class HeldServer:
    """A running server: its port, its process and the name of its size."""

    port: int
    pid: int
    size: str

    def is_alive(self) -> bool:
        """Return True while the process runs."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def is_ready(self) -> bool:
        """Return True if the server answers requests."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=2):
                return True
        except OSError:
            return False


def find(folder: Path = DEFAULT_FOLDER) -> HeldServer | None:
    """Return the server that was started in this folder; None if there is none."""
    file = folder / STATE
    if not file.exists():
        return None
    server = HeldServer(**json.loads(file.read_text(encoding="utf-8")))
    return server if server.is_alive() else None


def start(folder: Path, size: Size) -> HeldServer:
    """Start a server, or wait for the one that starts already.

    Raises:
        SystemExit: the server ended before it was ready.
    """
    server = begin(folder, size)
    while not server.is_ready():
        if not server.is_alive():
            log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"the server did not start; the end of its log:\n{log[-3000:]}")
        time.sleep(POLL_SECONDS)
    return server


def begin(folder: Path, size: Size) -> HeldServer:
    """Begin to start a server in a session of its own; return the one that runs, if there is one.

    Args:
        folder: for the models, the state and the log; models that are there are used again.
        size: shapes of the models.
    """
    running = find(folder)
    if running is not None:
        return running
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    if not (folder / "server.toml").exists():
        write_models(folder, size, device)
    config = write_config(folder, size, GPU_OPTIONS if is_gpu else CPU_OPTIONS)
    port = free_port()
    command = [sys.executable, "-m", "infer_align_server", "serve", str(config)]
    command += ["--set", f"server.port={port}"]
    environment = {**os.environ, **({} if is_gpu else CPU_ENVIRONMENT)}
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    server = HeldServer(port, process.pid, size.name)
    (folder / STATE).write_text(json.dumps(asdict(server)), encoding="utf-8")
    return server


def stop(folder: Path = DEFAULT_FOLDER) -> None:
    """End the server and its processes, if there is one."""
    server = find(folder)
    (folder / STATE).unlink(missing_ok=True)
    if server is None:
        return
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive)


def main(arguments: Sequence[str] | None = None) -> None:
    """Begin to start the server, wait until it is ready, or stop it."""
    parser = argparse.ArgumentParser(description="Hold a server for the measurement on a GPU.")
    parser.add_argument("action", choices=("begin", "start", "stop"))
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of models and state")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    options = parser.parse_args(arguments)
    if options.action == "stop":
        stop(options.folder)
        return
    size = TINY if options.tiny else LARGE
    if options.action == "begin":
        print(f"starting at port {begin(options.folder, size).port}")
    else:
        print(f"ready at port {start(options.folder, size).port}")


if __name__ == "__main__":
    main()

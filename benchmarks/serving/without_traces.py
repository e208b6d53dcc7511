"""Serve as `infer-align` does, without everything that asks whether a request is traced.

The baseline of `benchmarks.serving.telemetry`. It imports nothing but the server, as the command
does: what else lies in memory also takes time.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from infer_align import stages

_BLOCK = nullcontext(lambda _: None)


def main() -> int:
    """Take the lines out, then run the command."""
    # Before anything imports these names.
    stages.stage = lambda *_: _BLOCK
    stages.trace_headers = dict
    from infer_align_server import telemetry  # noqa: PLC0415

    telemetry.following = lambda _: nullcontext()
    from infer_align_server import cli  # noqa: PLC0415

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

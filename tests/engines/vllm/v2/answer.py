"""Answer steered requests with vLLM's V2 runner and print the answers as JSON.

test_steering_v2.py runs this script in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from infer_align.engines.vllm.values import EngineValues
from tests.engines.vllm.stepping import (
    LOOKAHEAD_STEERINGS,
    STEERINGS,
    environment,
    make_engine,
    make_lookahead_values,
    make_values,
    mixed_requests,
    run,
)


def main(folder: str, options: str, n: str, kind: str) -> None:
    steerings = LOOKAHEAD_STEERINGS if kind == "lookahead" else STEERINGS
    with environment():
        by_name = make_lookahead_values() if kind == "lookahead" else make_values(Path(folder))
        values = EngineValues(by_name)
        engine = make_engine(values, **json.loads(options))
        requests = mixed_requests(int(n), steerings)
        for i, request in enumerate(requests):
            if i % 5 == 3:
                request.aborted_at = request.arrives + 3
        run(engine, values, requests)
        runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        answers = [
            {
                "tokens": request.tokens,
                "logprobs": request.logprobs,
                "finish_reason": request.finish_reason,
                "estimates": [*request.estimates.items()],
            }
            for request in requests
        ]
        result = {
            "runner": type(runner).__module__,
            "speculates": runner.speculator is not None,
            "requests": answers,
        }
        print(json.dumps(result))
        engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Answers steered requests in vLLM's V2 runner and prints them as JSON; run by test_steering_v2.py in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from infer_align.engines.vllm.steering import Steerer
from tests.engines.vllm.stepping import Ask, environment, make_engine, make_values, mixed, run


def main(folder: str, options: str, n: str) -> None:
    with environment():
        steerer = Steerer(make_values(Path(folder)))
        engine = make_engine(steerer, **json.loads(options))
        asks: list[Ask] = mixed(int(n))
        for i, ask in enumerate(asks):
            if i % 5 == 3:
                ask.aborted_at = ask.arrives + 3
        run(engine, steerer, asks)
        runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        found = [
            {
                "tokens": ask.tokens,
                "logprobs": ask.logprobs,
                "reason": ask.reason,
                "estimates": [*ask.estimates.items()],
            }
            for ask in asks
        ]
        print(
            json.dumps(
                {
                    "runner": type(runner).__module__,
                    "speculates": runner.speculator is not None,
                    "found": found,
                }
            )
        )
        engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Send generated requests with `align` to a server, and check every answer.

An answer is a 200 whose report agrees with itself, its choices and its usage, or an error of the
client that names a field of the request. Nothing else is allowed.

    python -m tests.server.align_fuzz --seconds 600 --seed 1 CONFIG.toml
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from infer_align import config as configuration
from tests.server.align_grammar import Generated, Grammar
from tests.server.conftest import Live, end, start

Json = Any
# Statuses that say what the client shall change, or that nothing could be scored.
REFUSALS = {400, 404, 413, 424}
# The rules that a schema cannot express are refusals of the server: they are not looked for here.
TOLERANCE = 1e-6


class Oracle:
    """Says what is wrong with an answer."""

    def __init__(self, document: dict[str, Json], *, engine_answers: bool = False) -> None:
        """Check by this OpenAPI document.

        Args:
            document: What the server says about itself.
            engine_answers: True if the engine, such as vLLM, answers requests without `align`
                itself. It reads fields in its own way, and refuses them in its own words.
        """
        self._engine_answers = engine_answers
        resource = Resource.from_contents(document, default_specification=DRAFT202012)
        self._registry: Any = Registry().with_resource("doc", resource)
        self._paths = document["paths"]
        self._validators: dict[str, Any] = {}

    def faults(self, sent: Generated, status: int, kind: str, text: str) -> Iterator[str]:
        """Yield what is wrong with the answer to a request."""
        operation = self._paths[sent.path]["post"]
        is_engines = self._engine_answers and sent.is_plain
        if status == 200:
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            wrong = "" if is_engines else self._first_error(body, sent.body)
            if wrong:
                yield f"accepted, and the document refuses it: {wrong}"
            if kind.startswith("text/event-stream"):
                if not text.rstrip().endswith("data: [DONE]"):
                    yield "a stream without an end"
                return
            answer = json.loads(text)
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            wrong = self._first_error(schema, answer)
            if wrong:
                yield f"an answer that the document does not describe: {wrong}"
            yield from consistency(sent, answer)
        elif status == 504:
            if "deadline_seconds" not in json.dumps(sent.body):
                yield "504 without a deadline"
        elif is_engines and status in REFUSALS:
            if not json.loads(text)["error"]["message"]:
                yield "a refusal without a message"
        elif status in REFUSALS:
            yield from self._refusal(sent, text)
        else:
            yield f"status {status}"

    def _first_error(self, schema: Json, value: Json) -> str:
        """Return the first violation of a schema of the document; "" if there is none."""
        text = json.dumps(schema).replace('"#/components', '"doc#/components')
        if text not in self._validators:
            self._validators[text] = jsonschema.Draft202012Validator(
                json.loads(text), registry=self._registry
            )
        error = jsonschema.exceptions.best_match(self._validators[text].iter_errors(value))
        return "" if error is None else f"{error.json_path}: {error.message[:200]}"

    def _refusal(self, sent: Generated, text: str) -> Iterator[str]:
        error = json.loads(text).get("error")
        if error is None:
            yield "a refusal in another form than OpenAI's"
            return
        param = error["param"]
        if error["code"] == "reward_failed":
            # No field is wrong: the rewards could not score these answers.
            return
        if not param:
            yield "a refusal that names no field"
            return
        if not error["message"].startswith(param.split(".")[0].split("[")[0]):
            yield "a message that does not begin with its field"
        if re.search(r"function-|constrained|dict\[|Traceback|0x[0-9a-f]{6}", error["message"]):
            quoted = json.dumps(sent.body)
            if not re.search(r"function-|constrained", quoted):
                yield "a message with internals"
        first = re.split(r"[.\[]", param)[0].strip('"')
        schema = self._paths[sent.path]["post"]["requestBody"]["content"]["application/json"]
        name = schema["schema"]["$ref"].rpartition("/")[2]
        resource: Any = self._registry.get_or_retrieve("doc").value
        known = resource.contents["components"]["schemas"][name]["properties"]
        # A limit on tokens is named by the request that lacks it.
        if not {first, param} & {*sent.body, *known, "max_completion_tokens", "max_tokens"}:
            yield f"a refusal that names {param}, which is no field of the request"


def consistency(sent: Generated, answer: Json) -> Iterator[str]:
    """Yield how an answer contradicts itself."""
    if sent.path in {"/v1/chat/completions", "/v1/completions"}:
        yield from _completion(sent.body, answer)
    elif sent.path == "/v1/align/score":
        yield from _scores(answer)
    elif sent.path == "/v1/rerank":
        scores = [result["relevance_score"] for result in answer["results"]]
        indices = [result["index"] for result in answer["results"]]
        if scores != sorted(scores, reverse=True) or len({*indices}) < len(indices):
            yield "documents that are not in the order of their scores"
    elif sent.path == "/v1/align/verify":
        thresholds = sent.body.get("thresholds") or {}
        approve = thresholds.get("approve", 0.5)
        if answer["disposition"] in {"approve", "tie"} and answer["confidence"] < approve:
            yield "approved below the threshold"


def _completion(body: Json, answer: Json) -> Iterator[str]:
    usage = answer["usage"]
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
        yield "a total that is not the sum"
    reports = answer.get("align")
    if reports is None:
        return
    prompts = reports.get("prompts", [reports])
    choices = len(answer["choices"])
    if choices > (body.get("n") or 1) * len(prompts):
        yield f"{choices} choices"
    if [choice["index"] for choice in answer["choices"]] != list(range(choices)):
        yield "choices that are not numbered"
    counted = 0
    for report in prompts:
        counted += sum(each["completion_tokens"] for each in report["candidates"])
        yield from _report(report)
    hidden = any(not report["candidates"] for report in prompts)
    if not hidden and counted > usage["completion_tokens"]:
        yield f"{counted} tokens of candidates, {usage['completion_tokens']} in usage"


def _report(report: Json) -> Iterator[str]:
    if "direction" in report:
        length = math.hypot(*report["direction"].values())
        if abs(length - 1) > TOLERANCE:
            yield f"a direction of length {length}"
    candidates = {each["index"]: each for each in report["candidates"]}
    if not candidates:
        return
    if report["selected"] not in candidates:
        yield "a selected candidate that is not listed"
        return
    whole = [index for index, each in candidates.items() if not each["error"]]
    if whole and report["selected"] not in whole:
        yield "a selected candidate that failed, and others did not"
    yield from _selection(report, len(candidates))
    rule = report.get("selection", {}).get("rule", "argmax")
    composed = any(
        "composed" in score for each in candidates.values() for score in each["scores"].values()
    )
    objectives = [
        each["objective"] for each in candidates.values() if each["objective"] is not None
    ]
    if rule == "argmax" and objectives and not composed and not report["dropped"]:
        best = candidates[report["selected"]]["objective"]
        if best is None or best < max(objectives):
            yield f"objective {best} was selected, {max(objectives)} is higher"


def _selection(report: Json, candidates: int) -> Iterator[str]:
    distribution = report.get("selection", {}).get("distribution")
    if distribution is None:
        return
    if len(distribution) != candidates or min(distribution) < 0:
        yield "a distribution of another length, or with a negative entry"
    elif abs(sum(distribution) - 1) > TOLERANCE:
        yield f"a distribution that sums to {sum(distribution)}"


def _scores(answer: Json) -> Iterator[str]:
    ranking = answer["ranking"]
    indices = [each["index"] for each in answer["candidates"]]
    if len({*ranking}) < len(ranking) or not {*ranking} <= {*indices}:
        yield "a ranking with a stranger, or with one candidate twice"


def fuzz(
    live: Live, seed: int, count: int, seconds: float = math.inf
) -> tuple[list[str], Counter[str]]:
    """Send `count` requests, or fewer if the time is over.

    Returns:
        What is wrong, with the request; and the number of answers by route and status.
    """
    document = live.get("/openapi.json").json()
    oracle = Oracle(document, engine_answers=live.service.app_engine is not None)
    wrong: list[str] = []
    answers: Counter[str] = Counter()
    end_time = time.monotonic() + seconds
    with live.http() as client:
        for sent in Grammar(document, seed).requests(count):
            content = json.dumps(sent.body).encode()
            answer = client.post(sent.path, content=content)
            answers[f"{sent.path} {answer.status_code}"] += 1
            kind = answer.headers.get("content-type", "")
            for fault in oracle.faults(sent, answer.status_code, kind, answer.text):
                wrong.append(
                    f"{fault}\n  {sent.path} {json.dumps(sent.body)}\n  {answer.text[:600]}"
                )
            if time.monotonic() > end_time:
                break
    return wrong, answers


def main() -> None:
    """Fuzz a server with the configuration of the command line, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    live = start(configuration.load(options.config))
    try:
        wrong, answers = fuzz(live, options.seed, 10**9, options.seconds)
    finally:
        end(live)
    print("\n".join(wrong))
    print(sorted(answers.items()), len(wrong), "faults")


if __name__ == "__main__":
    main()

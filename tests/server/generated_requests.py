"""Run schemathesis, which generates requests from an OpenAPI document, and judge its failures.

A schema cannot describe all that the server refuses: some rules are between fields, such as a worst
case over the limit, or a shape of a reward without a weight. Each refusal must be by such a rule,
and each error of the server a deadline that the request sets.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import environments
from tests.server.conftest import Live

REFUSED_BEYOND_THE_SCHEMA = "RejectedPositiveData"
# What the messages of refusals by a rule between fields say.
RULES = re.compile(
    r"over this server's limit"
    r"|only allowed if stream is true"
    r"|this request does not score"
    r"|needs candidates to choose from"
    r"|answers are requested, but only"
    r"|could be scored; first: not scored: .* no other candidate to compare with"
    r"|no such reward, nor an attribute of"
    r"|is not the index of|or the index of one of the|A single answer cannot be compared"
    # vLLM answers requests without `align` itself, and refuses them in its own words.
    r"|\d+ validation errors?:|prompt_embeds must be provided|Unsupported chat content part type"
    # What an engine cannot do is known once it runs, and an upstream only when it is asked.
    r"|needs label_logprobs, which the engine of"
    # The embedded engine reads no other field, and text alone.
    r"|this engine does not support the field|is not available on this engine"
)
PHASES = "examples,coverage,fuzzing"


def schemathesis(
    document: dict[str, Any],
    url: str,
    folder: Path,
    examples: int,
    phases: str = PHASES,
    options: Sequence[str] = (),
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Run one seeded test of a server.

    Args:
        document: The OpenAPI document.
        url: The server.
        folder: A folder for the files of the run.
        examples: The number of requests or of sequences, for each operation and phase.
        phases: The phases of schemathesis. "stateful" follows the links of the document.
        options: More options of its command line.

    Returns:
        The number of failures by kind, and the error of each answer that failed.
    """
    (folder / "openapi.json").write_text(json.dumps(document))
    done = subprocess.run(
        [
            environments.program("schemathesis", "schemathesis"),
            "run",
            "openapi.json",
            "--url",
            url,
            "--seed",
            "6",
            "--max-examples",
            str(examples),
            "--no-color",
            "--phases",
            phases,
            "--continue-on-failure",
            "--no-shrink",
            "--generation-database",
            "none",
            "--request-timeout",
            "60",
            "--report",
            "json",
            "--report-json-path",
            "report.json",
            *options,
        ],
        cwd=folder,
        env=environments.variables(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)  # shown where the test fails
    report = json.loads((folder / "report.json").read_text())
    assert report["complete"]
    assert not report["errors"], report["errors"]
    if phases == PHASES:
        assert report["operations"]["tested"] == len(document["paths"])
        assert report["test_cases"]["generated"] > 100
    else:
        # A run can pass without following a link, if no request is answered that has some.
        followed = re.search(r"API Links: +(\d+) covered", done.stdout)
        assert followed
        assert int(followed[1]) > 0
    counts = {failure["type"]: failure["count"] for failure in report["failures"]}
    errors = re.findall(r"^ +`(\{\"error\":.*\})`$", done.stdout, re.MULTILINE)
    return counts, [json.loads(error)["error"] for error in errors]


def check_failures(failures: dict[str, int], errors: Sequence[dict[str, Any]]) -> None:
    """Check that each failure is a refusal by a rule between fields, or a deadline."""
    assert failures.keys() <= {REFUSED_BEYOND_THE_SCHEMA, "ServerError"}
    # Every failure has its error here, so none escapes the checks below.
    assert len(errors) == sum(failures.values())
    refused = [error for error in errors if error["code"] != "deadline_exceeded"]
    assert len(errors) - len(refused) == failures.get("ServerError", 0)
    assert [error for error in refused if not RULES.search(error["message"])] == []


def own_document(live: Live, **options: Any) -> dict[str, Any]:
    """Return the document of a server that has no statuses of an upstream."""
    document: dict[str, Any] = live.get("/openapi.json", **options).json()
    for item in document["paths"].values():
        for operation in item.values():
            operation["responses"].pop("default", None)
    return document


def follow_links(live: Live, folder: Path, examples: int, key: str = "") -> None:
    """Follow the links between operations, once among all of them and once among profiles.

    Among all of them, most sequences end in a completion. So the profiles need a run of their own.

    Args:
        live: The server.
        folder: A folder for the files of the runs.
        examples: The number of sequences of each run.
        key: The API key.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options = [part for each in headers.items() for part in ("--header", ": ".join(each))]
    document = own_document(live, headers=headers)
    runs: dict[str, list[str]] = {"all": []}
    if live.service.profiles.keeps:
        runs["profiles"] = ["--include-path-regex", "align/(f|p)"]
    for name, selected in runs.items():
        chosen = folder / name
        chosen.mkdir()
        if name == "profiles":
            # With it, schemathesis begins with no feedback: it looks for an operation that makes
            # requests, whose id this field could hold.
            del document["components"]["schemas"]["FeedbackRequest"]["properties"]["request_id"]
        failures, errors = schemathesis(
            document, live.root, chosen, examples, "stateful", [*selected, *options]
        )
        check_failures(failures, errors)
    assert live.metric("infer_align_requests_total", status="500") == 0

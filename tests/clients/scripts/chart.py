"""Check a Helm chart with Helm itself, and each object that it makes with Kubernetes' schemas.

Run with the chart's folder and a list of values as JSON: one release for each of them is rendered.
"""

from __future__ import annotations

import json
import sys

import kubernetes_validate
import yaml
from helm_python import chart

KUBERNETES = "1.37"


def main() -> None:
    folder, releases = json.loads(sys.argv[1])
    report = chart.lint(folder, strict=True)
    assert not report["errors"], report
    loaded = chart.Chart.load(folder)
    objects = []
    for values in releases:
        kinds = {}
        for text in loaded.render(values, name="answers").values():
            for each in filter(None, yaml.safe_load_all(text)):
                kubernetes_validate.validate(each, KUBERNETES, strict=True)
                kinds[each["kind"]] = each
        objects.append(kinds)
    print(json.dumps(objects))


main()

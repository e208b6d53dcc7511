"""The chart as Helm and Kubernetes read it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import environments

pytestmark = pytest.mark.clients

CHART = Path(__file__).parents[2] / "deploy/helm/infer-align"
SCRIPT = Path(__file__).parent / "scripts/chart.py"


def run_script(*releases: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Render a release for each of the values."""
    return subprocess.run(
        [environments.program("chart"), str(SCRIPT), json.dumps([str(CHART), releases])],
        env=environments.variables(),
        capture_output=True,
        text=True,
        check=False,
    )


def render(*releases: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {kind: object} of each release."""
    done = run_script(*releases)
    assert done.returncode == 0, done.stderr[-4000:]
    objects: list[dict[str, Any]] = json.loads(done.stdout)
    return objects


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_every_switch_makes_objects_that_kubernetes_takes() -> None:
    plain, full, bare = render(
        {},
        {
            "autoscaling": {"enabled": True},
            "ingress": {"enabled": True},
            "limitsDatabaseSecret": "limits",
            "apiKeysFileSecret": "teams",
            "environmentSecrets": ["store", "hub"],
        },
        {"apiKeysSecret": "", "gpusPerReplica": 0, "config": "[engine]\nkind = 'fake'\n"},
    )
    assert set(plain) == {"ConfigMap", "Deployment", "Service"}
    assert set(full) == {*plain, "HorizontalPodAutoscaler", "Ingress"}
    (container,) = pod(full)["containers"]
    assert [each["name"] for each in container["env"]] == ["INFER_ALIGN_KEYS", "INFER_ALIGN_LIMITS"]
    assert [each["secretRef"]["name"] for each in container["envFrom"]] == ["store", "hub"]
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "api-keys")
    assert mount["mountPath"] == "/etc/infer-align-keys"
    (volume,) = (each for each in pod(full)["volumes"] if each["name"] == "api-keys")
    assert volume["secret"] == {"secretName": "teams"}
    (container,) = pod(bare)["containers"]
    assert "env" not in container
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert bare["ConfigMap"]["data"]["infer-align.toml"] == "[engine]\nkind = 'fake'\n"


@pytest.mark.parametrize("values", [{"gpusPerReplica": "two"}, {"replica": 2}])
def test_helm_refuses_a_wrong_value_by_its_name(values: dict[str, Any]) -> None:
    done = run_script(values)
    assert done.returncode != 0
    assert next(iter(values)) in done.stderr

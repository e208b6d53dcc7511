"""The files of deploy/: every query names what a running server exports, and every part exists.

Where `docker compose`, `helm` or `promtool` are installed, they check their files too.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer_align import config as configuration
from infer_align.config.schema import parse
from infer_align.config.server import Server
from infer_align_server.metrics import Metrics
from infer_align_server.profile_keeper import open_store
from tests.server.conftest import Live

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/infer-align"
NAME = re.compile(r"\binfer_align_\w+")
VALUE = re.compile(r"\.Values((?:\.\w+)+)")
# Labels that Prometheus adds itself.
ADDED_LABELS = {"instance", "job", "le"}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def board_queries() -> Iterator[str]:
    board = json.loads((DEPLOY / "grafana/dashboards/infer-align.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def queries() -> Iterator[str]:
    yield from board_queries()
    for group in read_yaml(DEPLOY / "prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def exported(live: Live) -> set[str]:
    """Return the names of the series of a running server."""
    names = set()
    for family in text_string_to_metric_families(live.get("/metrics").text):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    return names


def test_every_query_names_a_metric_that_the_server_exports(numbers: Live) -> None:
    names = exported(numbers)
    assert "infer_align_requests_total" in names
    asked = {name for query in queries() for name in NAME.findall(query)}
    assert len(asked) > 10
    assert asked <= names


def test_every_label_of_a_query_is_one_of_its_metric() -> None:
    labels = {family.name: {*family.labels, *ADDED_LABELS} for family in Metrics().families}
    for query in queries():
        assert query.count("(") == query.count(")"), query
        used: set[str] = set(re.findall(r'(\w+)=~?"', query))
        for group in re.findall(r"by \(([\w, ]+)\)", query):
            used |= {label.strip() for label in group.split(",")}
        allowed = set(ADDED_LABELS)
        for name in NAME.findall(query):
            allowed |= labels[name.removesuffix("_bucket")]
        assert used <= allowed, query


def test_every_alert_says_what_to_do() -> None:
    for group in read_yaml(DEPLOY / "prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            assert {"summary", "action"} == set(rule["annotations"])
            assert rule["labels"]["severity"] in {"page", "ticket"}


def test_the_files_that_the_composition_mounts_and_builds_exist() -> None:
    compose = read_yaml(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"server", "open-webui", "prometheus", "grafana", "postgres"}
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), source
        assert set(service.get("depends_on", ())) <= set(services)
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    text = (DEPLOY / "compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+)", text))
    example = (DEPLOY / "example.env").read_text()
    assert needed == set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    targets = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"][0]
    assert targets["static_configs"][0]["targets"] == ["server:8000"]


def test_the_composition_serves_a_configuration_that_loads() -> None:
    pytest.importorskip("transformers")
    config = configuration.load(DEPLOY / "infer-align.toml")
    assert config.server.host == "0.0.0.0"
    assert config.server.api_keys_env == "INFER_ALIGN_KEYS"
    server = read_yaml(DEPLOY / "compose.yaml")["services"]["server"]
    assert int(server["stop_grace_period"].removesuffix("s")) > config.server.drain_seconds
    assert {"INFER_ALIGN_KEYS", "INFER_ALIGN_STORE"} == set(server["environment"])


def test_the_composition_names_a_store_and_a_key_that_the_server_takes() -> None:
    pytest.importorskip("asyncpg")
    services = read_yaml(DEPLOY / "compose.yaml")["services"]
    values = dict(re.findall(r"^(\w+)=(.+)$", (DEPLOY / "example.env").read_text(), re.MULTILINE))

    def filled(service: str, name: str) -> str:
        text = services[service]["environment"][name]
        return re.sub(r"\$\{(\w+)[^}]*\}", lambda match: values[match[1]], text)

    asyncio.run(open_store(filled("server", "INFER_ALIGN_STORE")).close())
    keys = filled("server", "INFER_ALIGN_KEYS").split(",")
    assert filled("open-webui", "OPENAI_API_KEY") in keys


def test_the_composition_with_a_gpu_changes_the_same_server() -> None:
    compose, gpu = (read_yaml(DEPLOY / f"compose{part}.yaml") for part in ("", ".gpu"))
    (name,) = gpu["services"]
    build = {**compose["services"][name]["build"], **gpu["services"][name]["build"]}
    assert (DEPLOY / build["context"] / build["dockerfile"]).read_text().count("FROM vllm/")
    assert {volume.partition(":")[0] for volume in gpu["services"][name]["volumes"]} == set(
        gpu["volumes"]
    )


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/cpu.Dockerfile"])
def test_an_image_copies_what_exists_and_installs_extras_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(group.split(",")) <= set(extras["optional-dependencies"])


def test_the_image_for_gpus_has_what_a_store_and_traces_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "Dockerfile").read_text()
    for package in (
        *extras["optional-dependencies"]["store"],
        *extras["optional-dependencies"]["otel"],
    ):
        assert package.partition(">")[0] in text, package


def test_the_values_of_the_chart_fit_their_schema_and_the_templates() -> None:
    values = read_yaml(CHART / "values.yaml")
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    used = set()
    for path in (CHART / "templates").iterdir():
        used |= set(VALUE.findall(path.read_text()))
    for dotted in used:
        value = values
        for part in dotted.strip(".").split("."):
            assert part in value, dotted
            value = value[part]
    top = {dotted.strip(".").partition(".")[0] for dotted in used}
    assert top == set(values), "a value that no template reads"
    wrong = {**values, "gpusPerReplica": "two"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def rendered(path: Path) -> Any:
    """Return a template with a word for each expression, and without its conditions."""
    lines = []
    for line in path.read_text().splitlines():
        if re.fullmatch(r"\s*\{\{-? (if|range|end).*\}\}", line):
            continue
        lines.append(re.sub(r"\{\{.*?\}\}", "word", line))
    return yaml.safe_load("\n".join(lines))


def test_the_templates_of_the_chart_are_the_objects_of_a_deployment(numbers: Live) -> None:
    objects = {}
    for path in (CHART / "templates").iterdir():
        text = path.read_text()
        assert text.count("{{") == text.count("}}")
        assert len(re.findall(r"\{\{-? (?:if|range) ", text)) == len(
            re.findall(r"\{\{-? end ", text)
        )
        each = rendered(path)
        objects[each["kind"]] = each
    assert set(objects) == {
        "ConfigMap",
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "Ingress",
    }
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe, path in (("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert container[probe]["httpGet"]["path"] == path
        assert numbers.get(path).status_code == 200
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in exported(numbers)


def test_the_adapter_offers_the_metric_that_scales_the_chart(numbers: Live) -> None:
    (rule,) = read_yaml(DEPLOY / "prometheus/adapter.yml")["rules"]["custom"]
    (name,) = NAME.findall(rule["seriesQuery"])
    autoscaler = rendered(CHART / "templates/autoscaler.yaml")
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == name
    assert name in exported(numbers)


def test_a_replica_of_the_chart_has_time_to_drain() -> None:
    values = read_yaml(CHART / "values.yaml")
    section = tomllib.loads(values["config"])["server"]
    server = parse(Server, section, "server")
    # Five seconds pass before SIGTERM.
    assert values["terminationGracePeriodSeconds"] > server.drain_seconds + 5


def run_tool(*command: str) -> None:
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docker_compose_accepts_its_file() -> None:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("docker is not installed")
    version = subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    if version.returncode:
        pytest.skip("docker has no plugin compose")
    arguments = [docker, "compose", "--env-file", "example.env", "--file", "compose.yaml"]
    run_tool(*arguments, "config")
    run_tool(*arguments, "--file", "compose.gpu.yaml", "config")


def test_helm_accepts_the_chart() -> None:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed")
    run_tool(helm, "lint", "--strict", str(CHART))
    switches = "autoscaling.enabled=true,ingress.enabled=true"
    run_tool(helm, "template", "test", str(CHART), "--set", switches)


def test_promtool_accepts_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    run_tool(promtool, "check", "rules", "--lint-fatal", "prometheus/alerts.yml")
    run_tool(promtool, "check", "config", "--lint-fatal", "prometheus/prometheus.yml")

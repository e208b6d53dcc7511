"""The rules of this repository that a machine can check."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import infer_align
from infer_align import config
from infer_align.config import registry
from infer_align.config.align import Budget
from infer_align.objectives import Ensemble
from infer_align_server.wire.stream_options import StreamOptions

# One worker parses every file once.
pytestmark = pytest.mark.xdist_group("repo")

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


VAGUE_NAMES = {
    "found",
    "said",
    "told",
    "asked",
    "asks",
    "shown",
    "given",
    "wanted",
    "kept",
    "left",
    "most",
    "least",
    "seen",
    "known",
    "beside",
    "whole",
    "among",
    "others",
    "own",
    "mine",
    "theirs",
    "taken",
    "came",
    "tell",
    "says",
    "unsaid",
}
# Words that a docstring cannot begin with: it would describe without a verb.
VERBLESS = re.compile(r"(What|Who|Whoever|Whether|How|Which|Where|Why|When|Those|These)\b")
# Client classes mirror the server's parameters and have the same names on purpose.
MIRRORS = ROOT / "clients"


def python(code: str) -> str:
    """Run `code` in a fresh interpreter in the repository's root, and return what it prints."""
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


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(parse(path)))


@pytest.fixture(scope="module", autouse=True)
def _forget_the_trees() -> Iterator[None]:
    """Free a million nodes, which every later collection of garbage would look at."""
    yield
    nodes.cache_clear()
    parse.cache_clear()


def place(path: Path, node: Any) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


# --- layout ---


@pytest.mark.parametrize("folder", ["kernels", "server", "clients", "clients/python", "tests"])
def test_root_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        "a top-level `kernels` package breaks `import transformers`"
    )


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_packages_are_marked_as_typed(package: Path) -> None:
    assert (package / "py.typed").exists()


def test_files_are_short_and_named_by_a_noun() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {str(path): n for path, n in lengths.items() if n > 400}
    paths = (*MODULES, *(ROOT / "tests").rglob("*.py"))
    assert [p for p in paths if re.search("utils|helper|common|manager", p.stem)] == []


def test_functions_are_short() -> None:
    long = []
    for path in MODULES:
        if path.parts[-3] == "infer_align_kernels":
            continue  # a kernel is one function by nature
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node) is not None
                first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
                if (node.end_lineno or 0) - first.lineno + 1 > 40:
                    long.append(f"{place(path, node)} {node.name}")
    assert long == []


def test_the_flow_is_one_short_function() -> None:
    functions = [
        node
        for node in parse(ROOT / "infer_align/flow/run.py").body
        if isinstance(node, ast.AsyncFunctionDef)
    ]
    (align,) = functions
    assert align.name == "align"
    assert (align.end_lineno or 0) - align.lineno + 1 <= 30


# What a function is made of, level by level. An expression holds no statement.
LEVELS = (ast.stmt, ast.excepthandler, ast.match_case)
NESTING = (
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.If,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
)


def depth(node: ast.AST) -> int:
    """Return the levels of blocks inside a function; `elif` is no level of its own."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, LEVELS):
                continue
            is_elif = name == "orelse" and isinstance(child, ast.If) and len(value) == 1
            levels = depth(child) + (isinstance(child, NESTING) and not is_elif)
            deepest = max(deepest, levels)
    return deepest


def test_functions_nest_at_most_three_levels() -> None:
    deep = []
    for path in MODULES:
        if path.parts[-3] == "infer_align_kernels":
            continue  # a kernel is one function by nature
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and depth(node) > 3:
                deep.append(f"{place(path, node)} {node.name}")
    assert deep == []


def test_product_code_raises_errors_and_never_asserts() -> None:
    asserts = []
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.Assert):
                asserts.append(place(path, node))
    assert asserts == []


# --- language ---


def stored_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every variable, argument, attribute and function that is defined."""
    for node in nodes(path):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_names_are_nouns_and_verbs_of_the_field() -> None:
    vague = []
    for path in MODULES:
        for line, name in stored_names(path):
            if name in VAGUE_NAMES:
                vague.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert vague == []


def test_docstrings_begin_with_a_verb_or_a_subject() -> None:
    verbless = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in MODULES:
        for node in nodes(path):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text is not None and VERBLESS.match(text):
                verbless.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert verbless == []


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        if path.is_relative_to(MIRRORS):
            continue
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(place(path, node))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


# --- tests ---


def test_our_own_code_is_not_mocked() -> None:
    mocks = re.compile(r"unittest\.mock|mock\.patch|MagicMock\(")
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert [path for path in paths if mocks.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("folder", ["methods", "rewards", "engines"])
def test_every_plugin_has_tests_of_its_own(folder: str) -> None:
    tests = ROOT / "tests" / folder
    for name in getattr(registry, folder).names():
        paths = [*tests.glob(f"test_{name}*.py"), *(tests / name).glob("test_*.py")]
        assert paths, f"tests/{folder}/test_{name}.py is missing"


@pytest.mark.parametrize(
    "module",
    [
        "config/align",
        "config/config",
        "config/registry",
        "config/schema",
        "errors",
        "flow/clock",
        "flow/limits",
        "flow/observe",
        "flow/plan",
        "flow/propose",
        "flow/request",
        "flow/response",
        "flow/rules",
        "flow/run",
        "flow/scorers",
        "flow/scoring",
        "flow/seeds",
        "flow/selection",
        "messages",
        "objectives",
        "types",
        "vllm/interfaces",
        "vllm/package",
    ],
)
def test_every_part_of_the_core_has_tests_of_its_own(module: str) -> None:
    path = Path(module)
    assert (ROOT / "infer_align" / f"{module}.py").exists()
    assert (ROOT / "tests" / path.parent / f"test_{path.name}.py").exists()


def test_every_part_of_the_wire_has_tests_of_its_own() -> None:
    wire = ROOT / "server/infer_align_server/wire"
    # The schemas are tested with the OpenAPI document, streams with their requests.
    elsewhere = {"__init__", "response_schemas", "stream"}
    for path in wire.glob("*.py"):
        test = ROOT / "tests/server/wire" / f"test_{path.name}"
        assert path.stem in elsewhere or test.exists(), f"{test} is missing"


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


def exporting_modules() -> Iterator[Any]:
    """Yield the modules that list what they export; those that import vLLM need it here too."""
    for path in MODULES:
        if "__all__" in path.read_text(encoding="utf-8"):
            needs_vllm = path.is_relative_to(ROOT / "infer_align/vllm")
            yield pytest.param(path, id=path.stem, marks=[pytest.mark.vllm] if needs_vllm else [])


@pytest.mark.parametrize("path", list(exporting_modules()))
def test_exported_names_are_sorted_and_there(path: Path) -> None:
    for package in PACKAGES:
        if path.is_relative_to(package):
            parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    assert module.__all__ == sorted(module.__all__)
    if not path.is_relative_to(MIRRORS):
        # The client exports a type for each class that it mirrors.
        assert len(module.__all__) <= 25
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_exports_what_its_modules_define_and_nothing_else() -> None:
    names = {name for names in infer_align._HOMES.values() for name in names}
    assert {*names, "objectives"} == set(infer_align.__all__)
    for home, exported in infer_align._HOMES.items():
        module = importlib.import_module(f"infer_align.{home}")
        for name in exported:
            assert getattr(infer_align, name) is getattr(module, name)
    assert set(infer_align.__all__) <= set(dir(infer_align))
    with pytest.raises(AttributeError, match="module 'infer_align' has no attribute 'best'"):
        _ = infer_align.best  # type: ignore[attr-defined]


def test_importing_it_loads_no_other_package() -> None:
    # The milliseconds of an import depend on the machine; the modules that it loads do not.
    loaded = python(
        "import importlib, typing, sys; before = set(sys.modules)\n"
        "import infer_align; print(*sorted(set(sys.modules) - before))\n"
    )
    assert loaded.split() == ["infer_align"]


def test_modules_can_be_used_after_importing_the_package_alone() -> None:
    python(
        "import infer_align\n"
        "infer_align.config.load; infer_align.errors.AlignError; infer_align.objectives.Ensemble\n"
        "assert infer_align.types.Draw is infer_align.Draw\n"
    )


def test_a_command_loads_only_what_it_needs() -> None:
    loaded = python(
        "import sys; from infer_align_server import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: print(*sys.modules)\n"
    )
    packages = {name.partition(".")[0] for name in loaded.split()}
    assert "infer_align_server" in packages
    heavy = {"numpy", "pydantic", "fastapi", "aiohttp", "httpx2", "scipy", "torch"}
    assert not heavy & packages


@pytest.mark.slow
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
        # The folder alone is an empty namespace: transformers sees that it is another package.
        "found = sys.modules.get('kernels')\n"
        "assert found is None or not [name for name in vars(found) if not name.startswith('__')]\n"
        "assert not hub_kernels.is_kernels_available()\n"
    )
    python(code)


# --- documentation ---


def documented() -> dict[str, Any]:
    plugins = {
        f"{r.folder}.{name}": r.get(name)
        for r in (registry.methods, registry.rewards, registry.engines, registry.values)
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
    """Return `cls` and the dataclasses that its fields hold."""
    classes = [cls]
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                classes += nested(part)
    return classes


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_field_of_every_section_is_documented(name: str) -> None:
    for cls in nested(documented()[name]):
        assert cls.__doc__
        for field in dataclasses.fields(cls):
            description = field.metadata.get("description", "")
            assert description, f"{cls.__name__}.{field.name} has no description"
            assert description.endswith("."), f"{cls.__name__}.{field.name}: no sentence"


@functools.cache
def read_attributes() -> set[str]:
    """Return the names of all attributes that product code reads, `value.name`."""
    names = set()
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_field_of_every_section_is_read(name: str) -> None:
    attributes = read_attributes()
    for cls in nested(documented()[name]):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            # A field with one allowed value has nothing to read.
            if hints[field.name] != typing.Literal[False]:
                assert field.name in attributes, f"{cls.__name__}.{field.name} is never read"


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
    web = ROOT / "clients/web"
    for path in [p for p in web.rglob("*") if p.suffix in {".html", ".css", ".js", ".svg"}]:
        assert f"infer_align_server/web/{path.relative_to(web)}" in names, f"{path} is not shipped"
    assert "infer-align = infer_align_server.cli:main" in scripts
    needed = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not [line for line in needed if "torch" in line or "transformers" in line], (
        "the base install is light"
    )


# --- tests ---


def test_a_worker_of_a_parallel_run_takes_the_tests_of_a_group(
    request: pytest.FixtureRequest,
) -> None:
    """pytest-xdist groups by what it adds to the id of a test, which pytest 9.2 ignores."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("there are no workers")
    assert request.node.nodeid.endswith("@repo")

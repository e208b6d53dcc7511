"""A model in a zip file is unpacked once."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from infer_align.checkpoints.model_folder import model_folder
from infer_align.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pack(path: Path, **files: str) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/") + ".json", content)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "model__"])
def test_the_files_of_an_archive_are_unpacked(tmp_path: Path, prefix: str) -> None:
    names = {f"{prefix}config": "{}", f"{prefix}1_Pooling__config": '{"a": 1}'}
    folder = Path(model_folder(pack(tmp_path / "m.zip", **names), "encoder"))
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "1_Pooling/config.json").read_text() == '{"a": 1}'
    written = (folder / "config.json").stat().st_mtime_ns
    assert Path(model_folder(str(tmp_path / "m.zip"), "encoder")) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("../../outside.json", "{}")
    model_folder(str(tmp_path / "m.zip"), "encoder")
    assert not list(tmp_path.rglob("outside.json"))


def test_an_archive_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no")
    for path, reason in (
        (pack(tmp_path / "m.zip", other="{}"), "has no config.json"),
        (str(tmp_path / "text.zip"), "cannot be unpacked"),
        (str(tmp_path / "none.zip"), "cannot be unpacked"),
    ):
        with pytest.raises(ConfigError, match=reason):
            model_folder(path, "encoder")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "0" * 10_000_000)
    with pytest.raises(ConfigError, match="would take 10,000,000 bytes"):
        model_folder(str(tmp_path / "bomb.zip"), "encoder")


def test_another_name_is_what_transformers_takes(tmp_path: Path) -> None:
    assert model_folder("org/name", "encoder") == "org/name"
    assert model_folder(str(tmp_path), "encoder") == str(tmp_path)

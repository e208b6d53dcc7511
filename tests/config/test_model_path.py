"""Names of models: what is wrong with a path is said before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infer_align.config.model_path import check_model, file_name, is_gguf, model_of_url
from infer_align.errors import ConfigError


def test_a_hub_id_is_not_looked_up() -> None:
    for model in ("org/name", "gpt2", "demo", "some.org/name-1.5B"):
        check_model(model)


def test_a_folder_with_a_model_is_accepted(tmp_path: Path) -> None:
    for file in ("config.json", "params.json", "weights.Q4.gguf"):
        folder = tmp_path / file.replace(".", "-")
        folder.mkdir()
        (folder / file).write_text("{}")
        check_model(str(folder))


def test_a_missing_path_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "tiny.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"no such folder; did you mean '{tmp_path}/llama'"):
        check_model(f"{tmp_path}/lama")
    with pytest.raises(ConfigError, match=f"no such file; did you mean '{tmp_path}/tiny.gguf'"):
        check_model(f"{tmp_path}/tinny.gguf")
    with pytest.raises(ConfigError, match="'/no/such' does not exist either"):
        check_model("/no/such/folder")


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("readme.md", "name the folder that holds config.json"),
        ("adapter_config.json", "LoRA adapter"),
        ("infer-align.toml", "name the file: '{folder}/infer-align.toml'"),
        ("main/config.json", "did you mean '{folder}/main'?"),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, file: str, advice: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    expected = re.escape(advice.format(folder=tmp_path))
    with pytest.raises(ConfigError, match=rf"^\[engine\] model: .*no config.json.*{expected}"):
        check_model(str(tmp_path))


def test_a_file_of_weights_names_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"name its folder: '{tmp_path}'"):
        check_model(str(path))


@pytest.mark.parametrize(
    ("url", "model"),
    [
        ("file:///models/my%20llama", "/models/my llama"),
        ("https://huggingface.co/ORG/NAME", "ORG/NAME"),
        ("https://huggingface.co/ORG/NAME/tree/main?x=1", "ORG/NAME"),
        ("https://www.HuggingFace.co/ORG/NAME#files", "ORG/NAME"),
        ("hf.co/ORG/NAME", "ORG/NAME"),
        ("hf.co/ORG/NAME:Q4_K_M", "ORG/NAME"),
        ("https://huggingface.co/ORG/NAME/resolve/main/a.gguf", "ORG/NAME"),
        ("hf://ORG/NAME", "ORG/NAME"),
    ],
)
def test_a_url_of_a_model_is_told_its_name(url: str, model: str) -> None:
    with pytest.raises(ConfigError, match=f"is a URL; write '{model}'"):
        check_model(url)


def test_a_folder_that_looks_like_a_url_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hf.co" / "ORG" / "NAME"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    check_model("hf.co/ORG/NAME")


@pytest.mark.parametrize(
    "name", ["ORG/NAME", "huggingface.co/ORG", "http://127.0.0.1:8000/v1", "file://"]
)
def test_other_names_are_no_url_of_a_model(name: str) -> None:
    assert model_of_url(name) is None


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-8934.d96d"
    blob.write_bytes(b"GGUF\x03\0\0\0")
    check_model(str(blob))
    assert file_name(str(blob)) == "sha256-8934.d96d"
    assert file_name(str(tmp_path / "a.b.gguf")) == "a.b"
    assert not is_gguf(str(tmp_path))


def test_a_linked_folder_keeps_the_name_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights-3f2a" / "inner").mkdir(parents=True)
    (tmp_path / "my-model").symlink_to(tmp_path / "weights-3f2a")
    monkeypatch.chdir(tmp_path)
    assert file_name("./my-model") == file_name("my-model/") == "my-model"
    assert file_name("./weights-3f2a/inner/..") == "weights-3f2a"
    monkeypatch.chdir(tmp_path / "weights-3f2a")
    assert file_name(".") == "weights-3f2a"
    assert file_name("./elsewhere") is None

"""A GGUF file is unpacked once, and loads as the model that it was made from."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that want it
from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from infer_align.checkpoints.folders import LIST, cache_folder, is_whole
from infer_align.checkpoints.gguf import convert_gguf, find_gguf
from infer_align.errors import ConfigError
from tests.server.processes import FORKS

FIELD = "[engine] model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def convert(file: Path, dtype: str = "float32") -> tuple[Path, list[str]]:
    """Return the folder and the progress of a conversion."""
    progress: list[str] = []
    return convert_gguf(file, dtype, FIELD, progress.append), progress


def logits(folder, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return lm(torch.tensor([[5, 9, 60, 7]])).logits


def test_the_unpacked_model_and_tokenizer_are_those_that_the_file_was_made_from(
    gguf_model, language_model
):
    from transformers import AutoTokenizer

    folder, _ = convert(gguf_model())
    original = language_model("Llama")
    assert logits(folder).equal(logits(original))
    text = "the cat sat, 3 ä"
    read, written = (AutoTokenizer.from_pretrained(each) for each in (folder, original))
    assert read(text).input_ids == written(text).input_ids
    assert read.chat_template == written.chat_template
    assert read.eos_token == "</s>"


@pytest.mark.parametrize(
    ("begins", "expected"), [(True, ["</s>", "a"]), (False, ["a"]), (None, ["a"])]
)
def test_a_text_begins_as_the_file_says(gguf_model, begins, expected):
    from transformers import AutoTokenizer

    folder, _ = convert(gguf_model(begins=begins))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == expected
    # A chat template writes the token itself.
    assert tokenizer("a", add_special_tokens=False).tokens() == ["a"]


def test_an_answer_ends_where_the_file_says(gguf_model):
    folder, _ = convert(gguf_model(turn_end=60))
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, 60]


@pytest.mark.parametrize(
    ("pad", "end", "expected"),
    [
        ("<|im_end|>", "</s>", [0, 1]),
        ("<|end|>", "</s>", [0, 1]),
        # gpt-oss ends a message with the first of these, and an answer with the second.
        ("<|end|>", "<|return|>", [1]),
        ("<|call|>", "<|return|>", [0, 1]),
    ],
)
def test_an_answer_ends_where_a_turn_of_the_vocabulary_ends(gguf_model, pad, end, expected):
    folder, _ = convert(gguf_model(pad=pad, end=end))
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == expected


def test_a_file_is_unpacked_once_for_each_type(gguf_model):
    file = gguf_model()
    folder, progress = convert(file)
    assert progress[0].startswith("unpacking tiny.gguf")
    assert convert(file) == (folder, [])
    other, progress = convert(file, "bfloat16")
    assert other != folder
    assert len(progress) == 1
    # Without a type, the weights are halved.
    assert convert(file, "auto") == (other, [])


@pytest.mark.slow
def test_the_content_of_the_file_names_the_entry_and_not_its_path(gguf_model, tmp_path):
    folder, _ = convert(gguf_model())
    copy = shutil.copy(gguf_model(), tmp_path / "tiny.gguf")
    assert convert(Path(copy)) == (folder, [])
    data = bytearray(Path(copy).read_bytes())
    data[-1] ^= 1
    Path(copy).write_bytes(data)
    assert convert(Path(copy))[0] != folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "deleted", "emptied", "list", "header"])
def test_a_damaged_entry_is_made_again(gguf_model, damage):
    file = gguf_model()
    folder, _ = convert(file)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "deleted":
        (folder / "config.json").unlink()
    elif damage == "emptied":
        (folder / "tokenizer.json").write_text("")
    elif damage == "list":
        (folder / LIST).write_text("{")
    else:
        weights.write_bytes(b"\0" * weights.stat().st_size)
    assert not is_whole(folder)
    again, progress = convert(file)
    assert again == folder
    assert len(progress) == 1
    assert is_whole(folder)


def test_a_process_that_died_while_it_made_an_entry_leaves_nothing_in_the_way(gguf_model):
    file = gguf_model()
    folder, _ = convert(file)
    shutil.rmtree(folder)
    (folder.parent / f"{folder.name}.abc.part").mkdir()
    assert convert(file)[0] == folder
    assert is_whole(folder)


def _convert_at(barrier, file, queue, cache_home):
    os.environ["XDG_CACHE_HOME"] = cache_home
    barrier.wait()
    queue.put(convert(file))


@pytest.mark.slow
def test_two_processes_at_once_make_one_entry(gguf_model):
    file = gguf_model()
    barrier, queue = FORKS.Barrier(2), FORKS.Queue()
    arguments = (barrier, file, queue, os.environ["XDG_CACHE_HOME"])
    processes = [FORKS.Process(target=_convert_at, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    (first, one), (second, other) = queue.get(timeout=100), queue.get(timeout=100)
    for process in processes:
        process.join()
    assert first == second
    assert len(one) + len(other) == 1
    assert is_whole(first)
    assert not list(first.parent.glob("*.part"))


# --- what a name stands for ---


def test_a_folder_with_one_gguf_file_stands_for_it(gguf_model, tmp_path):
    file = Path(shutil.copy(gguf_model(), tmp_path / "one.gguf"))
    assert find_gguf(str(tmp_path), FIELD) == file
    assert find_gguf(str(file), FIELD) == file
    # The image encoder of a multimodal model is no model of its own.
    shutil.copy(file, tmp_path / "mmproj-one.gguf")
    assert find_gguf(str(tmp_path), FIELD) == file
    # A name without the suffix is recognized by the content.
    bare = Path(shutil.copy(file, tmp_path / "bare"))
    assert find_gguf(str(bare), FIELD) == bare


def test_a_folder_with_other_weights_is_none_and_a_hub_id_neither(gguf_model, tmp_path):
    shutil.copy(gguf_model(), tmp_path / "one.gguf")
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(str(tmp_path), FIELD) is None
    assert find_gguf("HuggingFaceTB/SmolLM2-135M", FIELD) is None


def test_a_folder_with_several_files_names_them(gguf_model, tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(gguf_model(), tmp_path / name)
    with pytest.raises(ConfigError, match=r"several GGUF files: q4.gguf, q8.gguf. Name one"):
        find_gguf(str(tmp_path), FIELD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a zip archive", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "has the GGUF version 1; 2 and 3 can be read"),
        (b"GGUF" + struct.pack(">I", 3), "has the GGUF version 50331648"),
        (b"GGUF", "has the GGUF version 0"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        find_gguf(str(file), FIELD)


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        find_gguf(str(tmp_path / "model.gguf"), FIELD)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_truncated_file_is_refused_and_leaves_nothing(gguf_model, tmp_path, share):
    data = gguf_model().read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ConfigError, match=r"cut.gguf' cannot be read as a GGUF model.*again"):
        convert(file)
    assert not [path for path in (cache_folder() / "gguf").iterdir() if path.is_dir()]


def test_an_architecture_that_transformers_does_not_know_is_refused(gguf_model):
    with pytest.raises(ConfigError, match="nonsense"):
        convert(gguf_model(architecture="nonsense"))


def test_a_file_without_some_weights_is_refused(gguf_model):
    with pytest.raises(ConfigError, match=r"no weights for model.layers.1.mlp.up_proj.weight"):
        convert(gguf_model(without="model.layers.1.mlp.up_proj.weight"))


def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(gguf_model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        convert(gguf_model())

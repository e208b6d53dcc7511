"""Test the file of a head: it is written atomically, read back, and refused if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from infer_align.errors import ConfigError
from infer_align.fitting import regression
from infer_align.values import FrozenModel, head, tokenizer_digest
from infer_align.values._head_arithmetic import CpuHead, HeadArithmetic, KernelHead
from infer_align.values.head import Head, HeadValue

D, V, R, W = 6, 11, 3, 5
FROZEN = FrozenModel("tiny", V, D, tokenizer_digest({"a": 0}), "cpu")


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {"P": (R, D), "E": (V, R), "b": (V,)},
    "mlp": {"W1": (W, D), "c1": (W,), "W2": (R, W), "E": (V, R), "b": (V,)},
}


def tensors(form: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES[form].items():
        made[name] = torch.randn(shape, generator=generator)
    return made


@pytest.mark.parametrize("form", SHAPES)
def test_a_head_is_read_back_as_it_was_written(tmp_path: Path, form: str) -> None:
    made, path = tensors(form), tmp_path / "deep" / "value.v1.safetensors"
    head.write(path, made, FROZEN, {"reward": "helpful", "description": "a helpful answer"})
    stored, metadata = head.read(str(path))
    assert stored.keys() == made.keys()
    for name, tensor in made.items():
        assert torch.equal(stored[name], tensor)
    assert metadata == {
        "reward": "helpful",
        "description": "a helpful answer",
        "kind": "head",
        "model": "tiny",
        "tokenizer": FROZEN.tokenizer,
        "hidden_size": str(D),
    }


def test_the_configured_description_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    head.write(path, tensors("linear"), FROZEN, {"description": "a helpful answer"})
    value = HeadValue(str(path))
    value.start(FROZEN, {})
    assert value.description == "a helpful answer"
    described = Head(str(path), description="from the configuration").load()
    described.start(FROZEN, {})
    assert described.description == "from the configuration"


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("arrangement", [CpuHead, KernelHead])
def test_a_head_has_the_values_that_were_fitted(
    form: str, arrangement: Callable[[Mapping[str, torch.Tensor]], HeadArithmetic]
) -> None:
    made = tensors(form)
    arithmetic = arrangement(made)
    hidden = torch.randn((4, D), generator=torch.Generator().manual_seed(1))
    every = torch.arange(V)
    fitted = regression.predict(made, hidden.repeat_interleave(V, 0), every.repeat(4)).view(4, V)
    centred = fitted - fitted.mean(dim=1, keepdim=True)
    assert_close(arithmetic.evaluate_all(hidden), centred)
    ids = torch.tensor([[0, 5, 5], [1, 2, 3], [10, 9, 8], [4, 4, 4]])
    assert_close(arithmetic.evaluate(hidden, ids), centred.gather(1, ids))
    assert_close(arithmetic.evaluate(hidden, ids[:, :1]), centred.gather(1, ids[:, :1]))
    policy = torch.softmax(fitted, dim=1)
    assert_close(arithmetic.expected(hidden, policy), (policy * fitted).sum(dim=1))
    beta = torch.tensor([1.0, -2.0])
    logits = torch.full((4, V), 0.5)
    arithmetic.add_all(logits, hidden[:2], beta, torch.tensor([3, 0]))
    assert_close(logits[3], 0.5 + centred[0])
    assert_close(logits[0], 0.5 - 2 * centred[1])
    assert torch.equal(logits[1:3], torch.full((2, V), 0.5))
    logits = torch.full((2, V), 0.5)
    arithmetic.add_all(logits, hidden[:2], beta, None)
    assert_close(logits, 0.5 + beta[:, None] * centred[:2])


def test_the_arithmetic_of_a_cpu_keeps_one_table(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    head.write(path, tensors("mlp"), FROZEN, {})
    value = HeadValue(str(path))
    value.start(FROZEN, {})
    assert isinstance(value.arithmetic, CpuHead)
    weight, bias = value.tensors["E"], value.tensors["b"]
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()


def test_a_head_that_is_not_started_has_no_values() -> None:
    with pytest.raises(RuntimeError, match=r"v.safetensors is not started; call start\(\) first"):
        HeadValue("v.safetensors").evaluate(torch.zeros((1, D)), torch.zeros((1, 1)).long())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    head.write(path, tensors("linear"), FROZEN, {})
    before = path.read_bytes()
    broken: Any = {**tensors("linear"), "E": torch.empty(2, 2, device="meta")}
    # safetensors decides on the class of the error.
    with pytest.raises(Exception, match=r"."):
        head.write(path, broken, FROZEN, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        head.write(tmp_path / "folder", tensors("linear"), FROZEN, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "v.safetensors"]


def test_tensors_that_are_views_can_be_written(tmp_path: Path) -> None:
    made = tensors("linear")
    joined = torch.cat([made["E"], made["b"][:, None]], dim=1)
    head.write(tmp_path / "v", {**made, "E": joined[:, :-1], "b": joined[:, -1]}, FROZEN, {})
    assert torch.equal(head.read(str(tmp_path / "v"))[0]["E"], made["E"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "other"}, "their token ids differ"),
        ({"hidden_size": 8}, r"reads hidden states of size 6, but those of 'tiny' have 8"),
        ({"vocabulary": 12}, "values 11 tokens, but 'tiny' has 12"),
    ],
)
def test_a_head_for_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "v.safetensors"
    head.write(path, tensors("mlp"), FROZEN, {})
    with pytest.raises(ConfigError, match=message) as caught:
        HeadValue(str(path)).start(replace(FROZEN, **change), {})
    assert str(path) in caught.value.message


@pytest.mark.parametrize("drop", ["P", "E", "b"])
def test_a_head_with_a_part_missing_is_refused(tmp_path: Path, drop: str) -> None:
    made = tensors("linear")
    del made[drop]
    head.write(tmp_path / "v", made, FROZEN, {})
    with pytest.raises(ConfigError, match="not a value head"):
        HeadValue(str(tmp_path / "v")).start(FROZEN, {})


@pytest.mark.parametrize(
    "shapes",
    [{"E": (V, R + 1)}, {"b": (V - 1,)}, {"P": (R + 1, D)}, {"P": (D,)}, {"P": (R, D + 1)}],
)
def test_a_head_whose_shapes_do_not_fit_is_refused(tmp_path: Path, shapes: Any) -> None:
    made = tensors("linear")
    for name, shape in shapes.items():
        made[name] = torch.zeros(shape)
    head.write(tmp_path / "v", made, FROZEN, {})
    with pytest.raises(ConfigError, match=r"not a value head|hidden states of size 7"):
        HeadValue(str(tmp_path / "v")).start(FROZEN, {})


def test_a_file_that_is_not_a_head_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    save_file(tensors("linear"), tmp_path / "bare")
    for name in ("none", "text", "empty", "folder", "bare"):
        with pytest.raises(ConfigError, match=str(tmp_path / name)):
            HeadValue(str(tmp_path / name)).start(FROZEN, {})
    with pytest.raises(ConfigError, match="value-nothing"):
        HeadValue("demo/value-nothing").start(FROZEN, {})


def test_the_digest_depends_on_the_ids_and_not_on_their_order() -> None:
    digest = tokenizer_digest({"a": 0, "b": 1})
    assert tokenizer_digest({"b": 1, "a": 0}) == digest
    assert tokenizer_digest({"a": 1, "b": 0}) != digest

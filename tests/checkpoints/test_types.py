"""Types of weights are floats of at least two bytes, and others are refused with what to write."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from infer_align.checkpoints.types import check_weights_type
from infer_align.errors import ConfigError
from infer_align.rewards.classifier import Classifier


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "half", "float64"])
def test_types_of_weights_are_accepted(dtype: str) -> None:
    check_weights_type("here", dtype)


@pytest.mark.parametrize(
    "dtype", ["", "fp32", "int8", "int32", "bool", "complex64", "float8_e5m2", "Tensor", "nn"]
)
def test_other_types_are_refused_with_what_to_write(dtype: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_weights_type("here", dtype)
    assert refused.value.message == (
        f'here: {dtype!r} is no type of weights. Use "auto", "float32", "bfloat16" or "float16".'
    )


@pytest.mark.anyio
async def test_a_reward_names_its_wrong_type() -> None:
    reward = Classifier(model="demo/reward-0", dtype="int32").load()
    with pytest.raises(ConfigError, match=r"^classifier: dtype: 'int32' is no type of weights"):
        await reward.start()
    await reward.close()

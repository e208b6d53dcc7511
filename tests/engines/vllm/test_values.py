"""The values of an engine in the server: what is refused before and after vLLM starts."""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import
from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infer_align import demo
from infer_align.engines.vllm.extra_args import STEERING_KEY, published_value_names
from infer_align.engines.vllm.values import (
    PROCESSOR,
    WORKER_EXTENSION,
    EngineValues,
    _lookahead_conflicts,
    _memory_warnings,
)
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.steering import EstimateSchedule, Steering
from infer_align.types import Draw
from infer_align.values import FrozenModel, Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue, ValueLM
from tests.engines.vllm.stepping import WARNINGS, demo_model

pytestmark = WARNINGS
HELPFUL = "demo/value-helpful.safetensors"
BRIEF = "demo/value-brief.safetensors"


def make_values() -> EngineValues:
    return EngineValues({"helpful": HeadValue(HELPFUL), "brief": HeadValue(BRIEF)})


def test_without_values_vllm_is_not_changed() -> None:
    empty = EngineValues({})
    assert not empty.enabled
    assert empty.engine_options({"max_model_len": 64}) == {"max_model_len": 64}
    config: Any = SimpleNamespace(additional_config={})
    empty.configure(config)
    assert config.additional_config == {}

    async def call_workers(*_: object) -> list[Any]:
        raise AssertionError("no worker is called")

    with pytest.raises(ConfigError, match="started without values"):
        asyncio.run(empty.add("x", HeadValue(HELPFUL), call_workers))


def test_the_options_of_steering_are_added_to_the_users_own() -> None:
    options = make_values().engine_options(
        {"max_model_len": 64, "logits_processors": ["user:Processor"]}
    )
    assert options == {
        "max_model_len": 64,
        "logits_processors": ["user:Processor", PROCESSOR],
        "worker_extension_cls": WORKER_EXTENSION,
    }
    with pytest.raises(ConfigError, match=r"worker_extension_cls: 'user\.Extension'"):
        make_values().engine_options({"worker_extension_cls": "user.Extension"})


class OtherValue(Value):
    """A kind of value that vLLM's workers do not know."""

    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        raise AssertionError("it is not started")


def test_an_unknown_kind_of_value_is_refused_by_name() -> None:
    message = r"\[values.odd\] kind 'test_values' cannot run inside vLLM; use kind = \"head\""
    with pytest.raises(ConfigError, match=message):
        EngineValues({"odd": OtherValue()})


@pytest.fixture(scope="module")
def value_lm() -> ValueLM:
    value = LookaheadValue(Lookahead("demo/value-lm", "helpful"))
    value.start(demo_model(), {})
    assert value.lm is not None
    return value.lm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": SimpleNamespace(num_speculative_tokens=2)}, "speculative_config"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"max_model_len": 2048}, "reads up to 1024 tokens, but max_model_len is 2048; set"),
    ],
)
def test_a_configuration_in_which_a_value_lm_cannot_read_is_refused(
    value_lm: ValueLM, changes: dict[str, Any], message: str
) -> None:
    [reason] = _lookahead_conflicts(engine_config(**changes), value_lm)
    assert message in reason
    assert not [*_lookahead_conflicts(engine_config(), value_lm)]


def test_the_memory_of_a_value_lm_on_a_gpu_is_a_warning(value_lm: ValueLM) -> None:
    assert not [*_memory_warnings(engine_config(), value_lm)]
    # 2 layers of 2 heads of 32 numbers of 4 bytes, keys and values.
    [warning] = _memory_warnings(engine_config(device_type="cuda", max_num_seqs=1024), value_lm)
    assert "up to 0.5 GiB of keys and values, for 1024 requests of 512 tokens" in warning


def make_draw(
    steering: Steering | None, estimates: EstimateSchedule | None = None, **body: Any
) -> Draw:
    return Draw(body, steering=steering, estimates=estimates)


def test_a_draw_is_checked_as_by_the_embedded_engine() -> None:
    values = make_values()
    with pytest.raises(InvalidRequest) as caught:
        values.check(make_draw(Steering({"helpfull": 1.0}, 5, "keep")))
    assert caught.value.message == "align.vas.beta.helpfull: no such value; did you mean 'helpful'?"
    assert caught.value.param == "align.vas.beta.helpfull"
    with pytest.raises(InvalidRequest, match="use_beam_search"):
        values.check(make_draw(Steering({"helpful": 1.0}, 5, "keep"), use_beam_search=True))
    values.check(make_draw(Steering({"helpful": 1.0}, 5, "keep"), use_beam_search=False))
    with pytest.raises(InvalidRequest) as caught:
        values.check(make_draw(None, EstimateSchedule({"helpfull": 1.0}, 4)))
    assert caught.value.param == "align.early_stop.values.helpfull"


def engine_config(**changes: Any) -> Any:
    """Return the parts of a VllmConfig that `configure` reads, for the demo's model."""
    model = SimpleNamespace(
        model=str(demo.path(demo.LM)),
        is_diffusion=False,
        enable_prompt_embeds=False,
        max_model_len=512,
        get_vocab_size=lambda: 1992,
        get_hidden_size=lambda: 64,
    )
    parallel = SimpleNamespace(
        enable_batch_sharded_sampling=False,
        distributed_executor_backend="mp",
        pipeline_parallel_size=1,
    )
    scheduler = SimpleNamespace(max_num_seqs=256)
    device = SimpleNamespace(device_type="cpu")
    config = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        speculative_config=None,
        scheduler_config=scheduler,
        device_config=device,
        use_v2_model_runner=True,
        additional_config={"user": 1},
    )
    for name, value in changes.items():
        for section in (model, parallel, scheduler, device, config):
            if hasattr(section, name):
                setattr(section, name, value)
                break
    return config


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        (
            {"distributed_executor_backend": "external_launcher", "pipeline_parallel_size": 2},
            "external_launcher",
        ),
        ({"is_diffusion": True}, "diffusion"),
        (
            {
                "speculative_config": SimpleNamespace(num_speculative_tokens=2),
                "use_v2_model_runner": False,
            },
            "V1 model runner",
        ),
        (
            {
                "speculative_config": SimpleNamespace(num_speculative_tokens=7),
                "max_num_seqs": 512,
                "get_vocab_size": lambda: 128256,
            },
            r"512 sequences of 7 \+ 1 tokens are 4096 rows of logits, over the 2092 "
            ".* set max_num_seqs to 261 or less",
        ),
    ],
)
def test_a_configuration_that_would_skip_steering_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=message):
        make_values().configure(engine_config(**changes))


@pytest.mark.vllm
def test_vllms_own_configurations_are_checked_in_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    options = {
        "model": str(demo.path(demo.LM)),
        "dtype": "float32",
        "max_model_len": 64,
        "kv_cache_memory_bytes": 1 << 24,
    }
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    values = make_values()
    config = EngineArgs(
        **values.engine_options({**options, "speculative_config": speculative})
    ).create_engine_config()
    with pytest.raises(ConfigError, match="speculative_config"):
        values.configure(config)

    config = EngineArgs(**values.engine_options(options)).create_engine_config()
    values.configure(config)
    sources = config.additional_config[STEERING_KEY]["values"]
    assert {name: source["path"] for name, source in sources.items()} == {
        "helpful": HELPFUL,
        "brief": BRIEF,
    }
    assert {"helpful", "brief"} <= published_value_names()
    values.close()

    missing = EngineValues({"x": HeadValue(str(tmp_path / "none.safetensors"))})
    with pytest.raises(ConfigError, match=str(tmp_path)):
        missing.configure(config)
    config.model_config.model_arch_config.hidden_size = 128
    with pytest.raises(ConfigError, match="hidden states of size 64"):
        make_values().configure(config)

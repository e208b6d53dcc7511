"""The frontend's half of steering: what it refuses, before and after vLLM starts. Needs no running vLLM."""

# ruff: noqa: PLC0415 - vLLM takes ten seconds to import
from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align import demo
from infer_align.engines.vllm import steering
from infer_align.engines.vllm.steering import KEY, PROCESSOR, WORKER_EXTENSION, Steerer, Terms
from infer_align.engines.vllm.watching import Fetcher, Named
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.types import Draw, EstimateSchedule, Steering
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue
from tests.engines.vllm.stepping import WARNINGS

pytestmark = WARNINGS
HELPFUL = "demo/value-helpful.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _apart() -> Iterator[None]:
    """The names that engines of this process have announced are not ours to change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "announced", set())
        yield


def steerer() -> Steerer:
    return Steerer(
        {"helpful": HeadValue(HELPFUL), "brief": HeadValue("demo/value-brief.safetensors")}
    )


def test_without_values_nothing_is_added() -> None:
    empty = Steerer({})
    assert not empty.active
    assert empty.engine_args({"max_model_len": 64}) == {"max_model_len": 64}
    config = SimpleNamespace(additional_config={})
    empty.configure(config)
    assert config.additional_config == {}
    with pytest.raises(ConfigError, match="started without values"):
        asyncio.run(empty.add("x", HeadValue(HELPFUL), None))  # type: ignore[arg-type]


def test_what_vllm_is_told_is_added_to_what_the_user_says() -> None:
    args = steerer().engine_args({"max_model_len": 64, "logits_processors": ["mine:Own"]})
    assert args == {
        "max_model_len": 64,
        "logits_processors": ["mine:Own", PROCESSOR],
        "worker_extension_cls": WORKER_EXTENSION,
    }
    with pytest.raises(ConfigError, match=r"worker_extension_cls: 'mine\.Own'"):
        steerer().engine_args({"worker_extension_cls": "mine.Own"})


def test_a_lookahead_value_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"\[values.slow\] kind 'lookahead' cannot live inside vLLM"
    ):
        Steerer({"slow": LookaheadValue(Lookahead("demo/value-lm"))})


def draw(
    steering: Steering | None, estimates: EstimateSchedule | None = None, **fields: Any
) -> Draw:
    return Draw(fields, steering=steering, estimates=estimates)


def test_requests_are_checked_as_by_the_embedded_engine() -> None:
    with pytest.raises(InvalidRequest) as caught:
        steerer().check(draw(Steering({"helpfull": 1.0}, 5, "keep")))
    assert caught.value.message == "align.vas.beta.helpfull: no such value; did you mean 'helpful'?"
    assert caught.value.param == "align.vas.beta.helpfull"
    with pytest.raises(InvalidRequest, match="use_beam_search"):
        steerer().check(draw(Steering({"helpful": 1.0}, 5, "keep"), use_beam_search=True))
    steerer().check(draw(Steering({"helpful": 1.0}, 5, "keep"), use_beam_search=False))
    with pytest.raises(InvalidRequest) as caught:
        steerer().check(draw(None, EstimateSchedule({"helpfull": 1.0}, 4)))
    assert caught.value.param == "align.early_stop.values.helpfull"


@given(
    st.dictionaries(st.text(min_size=1), st.floats(-1000, 1000), min_size=1),
    st.integers(1, 2**40),
    st.sampled_from(["keep", "mask"]),
)
def test_what_is_sent_is_what_is_read(beta: dict[str, float], top_k: int, tail: Any) -> None:
    steering.announced.clear()
    terms = Terms.read(Steerer({}).extra_args(Steering(beta, top_k, tail)))
    used = {name: weight for name, weight in beta.items() if weight}
    assert terms == (Terms(used, top_k, tail == "mask") if used else None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "not of the form"),
        ({"beta": {"a": 1.0}}, "not of the form"),
        ({"beta": [1.0], "top_k": 1, "tail": "keep"}, "not of the form"),
        ({"beta": {"a": 1001.0}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": float("nan")}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": "1"}, "top_k": 1, "tail": "keep"}, "from -1000 to 1000"),
        ({"beta": {"a": 1.0}, "top_k": 0, "tail": "keep"}, "top_k"),
        ({"beta": {"a": 1.0}, "top_k": True, "tail": "keep"}, "top_k"),
        ({"beta": {"a": 1.0}, "top_k": 3, "tail": "cut"}, "tail"),
    ],
)
def test_whatever_else_comes_is_refused(given: Any, message: str) -> None:
    steering.announced.clear()
    with pytest.raises(ValueError, match=message):
        Terms.read({KEY: given})
    assert Terms.read(None) is None
    assert Terms.read({"other": 1}) is None


def configured(**changes: Any) -> Any:
    """What `configure` reads of a VllmConfig, of the demo's model."""
    model = SimpleNamespace(
        model=str(demo.path(demo.LM)),
        is_diffusion=False,
        get_vocab_size=lambda: 1992,
        get_hidden_size=lambda: 64,
    )
    parallel = SimpleNamespace(
        enable_batch_sharded_sampling=False,
        distributed_executor_backend="mp",
        pipeline_parallel_size=1,
    )
    given = {
        "model_config": model,
        "parallel_config": parallel,
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(max_num_seqs=256),
        "use_v2_model_runner": True,
        "additional_config": {"mine": 1},
    }
    for name, value in changes.items():
        holder = next(
            (c for c in (model, parallel, given["scheduler_config"]) if hasattr(c, name)), None
        )
        if holder is None:
            given[name] = value
        else:
            setattr(holder, name, value)
    return SimpleNamespace(**given)


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
            r"512 sequences of 7 \+ 1 tokens are 4096 rows of logits, over the 2092 .* set max_num_seqs to 261 or less",
        ),
    ],
)
def test_what_would_bypass_steering_is_refused_at_start(
    changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=message):
        steerer().configure(configured(**changes))


@pytest.mark.vllm
def test_vllms_own_configurations_are_refused_in_the_same_words(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    given = {
        "model": str(demo.path(demo.LM)),
        "dtype": "float32",
        "max_model_len": 64,
        "kv_cache_memory_bytes": 1 << 24,
    }
    speculative = {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        }
    }
    config = EngineArgs(**steerer().engine_args({**given, **speculative})).create_engine_config()
    with pytest.raises(ConfigError, match="speculative_config"):
        steerer().configure(config)
    config = EngineArgs(**steerer().engine_args(given)).create_engine_config()
    steerer().configure(config)
    assert config.additional_config[KEY]["values"] == {
        "helpful": HELPFUL,
        "brief": "demo/value-brief.safetensors",
    }
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Steerer({"x": HeadValue(str(tmp_path / "none.safetensors"))}).configure(config)
    config.model_config.model_arch_config.hidden_size = 128
    with pytest.raises(ConfigError, match="hidden states of size 64"):
        steerer().configure(config)


def test_a_watch_is_read_as_it_is_sent() -> None:
    named = Named("a", EstimateSchedule({"helpful": 0.5, "brief": -1.0}, 7))
    assert Named.read(named.extra_args()) == named
    assert Named.read(None) is None
    assert Named.read({"other": 1}) is None


@pytest.mark.parametrize(
    "given", [1, {}, {"name": "a", "values": {}, "after": 0}, {"name": 1, "values": {}, "after": 3}]
)
def test_another_watch_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"ask for align.early_stop instead"):
        Named.read({"infer_align_watch": given})


@pytest.mark.parametrize(
    "values",
    [{"helpful": None}, {"helpful": True}, {"helpful": "1"}, {"helpful": float("nan")}, {"": 1e9}],
)
def test_a_watch_that_a_worker_would_die_of_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"align.early_stop.values"):
        Named.read({"infer_align_watch": {"name": "a", "values": values, "after": 3}})


class Said:
    """Workers that say something when they are asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls = 0
        self.tokens = 0
        self.heard: list[tuple[str, int, float]] = []
        self.fetcher = Fetcher(self.fetch)

    async def fetch(self) -> Any:
        self.calls += 1
        await asyncio.sleep(0.01)
        return self.answers.pop(0) if self.answers else []

    def watch(self, name: str) -> None:
        told = partial(self.hear, name)
        self.fetcher.add(
            Named(name, EstimateSchedule({"helpful": 1.0}, 4)), lambda: self.tokens, told
        )

    def hear(self, name: str, tokens: int, value: float) -> None:
        self.heard.append((name, tokens, value))


@pytest.mark.anyio
async def test_estimates_are_fetched_when_they_are_due_and_somebody_waits() -> None:
    said = Said(
        [[("a", 4, 0.5), ("b", 4, 0.25)], [("a", 4, 0.5)]],
        [[("a", 8, 1.5), ("b", 8, 0.1), ("c", 4, 9.0)], []],
    )
    said.watch("a")
    said.watch("b")
    await asyncio.sleep(0.1)
    assert not said.calls, "nothing is due"
    said.tokens = 5
    await asyncio.sleep(0.1)
    assert said.calls == 1
    said.tokens = 9
    await asyncio.sleep(0.1)
    assert said.calls == 2
    said.fetcher.discard(["a", "b"])
    said.tokens = 100
    await asyncio.sleep(0.1)
    assert said.calls == 2, "nobody waits, nothing is asked"
    assert said.heard == [("a", 4, 0.5), ("b", 4, 0.25), ("a", 8, 1.5), ("b", 8, 0.1)]


@pytest.mark.anyio
async def test_what_was_said_before_an_end_is_told_before_it() -> None:
    said = Said([], [[("a", 4, 0.5)], []])
    said.watch("a")
    under_way = asyncio.create_task(said.fetcher.flush())
    await asyncio.sleep(0)
    await asyncio.gather(*(said.fetcher.flush() for _ in range(8)))
    assert said.heard == [("a", 4, 0.5)], "a fetch that had begun before is not enough"
    assert said.calls <= 3, "those that end together share one"
    await under_way
    said.fetcher.close()


@pytest.mark.anyio
async def test_workers_that_do_not_answer_hold_nobody_up(caplog: Any) -> None:
    said = Said()

    async def dies() -> Any:
        raise RuntimeError("gone")

    said.fetcher = Fetcher(dies)
    said.watch("a")
    await said.fetcher.flush()
    assert "could not be fetched" in caplog.text

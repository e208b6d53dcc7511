"""Test fitting from prompts to a saved value and its report, on a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from infer_align import fitting
from infer_align.engines.transformers import Transformers
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.fitting import FitConfig, fit_value, fit_value_lm
from infer_align.fitting.samples import read_states, sample_replies
from infer_align.fitting.samples_file import SamplingConfig, ScoredReply, read_samples
from infer_align.values import head
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SAMPLING = SamplingConfig("tiny", "length", "mean", replies_per_prompt=10, max_tokens=4, seed=1)
QUICK = FitConfig(
    method="ridge",
    rank=8,
    ridge=20.0,
    epochs=2,
    width=8,
    kl_targets=(0.5, 2.0),
    kl_limit=2.0,
    curve_replies=12,
)


def letters(text: str) -> float:
    return float(sum(c.isalpha() for c in text))


def read_summary(engine: Any, out: Path) -> Any:
    """Return the summary of a stored value, as a server reads it at its start."""
    value: Any = HeadValue(str(out))
    if out.is_dir():
        value = LookaheadValue(Lookahead(str(out)))
    value.start(engine.frozen.frozen("tiny"), {})
    return value.summary


FORMS: list[dict[str, Any]] = [
    {"method": "auto", "ridge": None, "min_p": 0.1},
    {"method": "sgd"},
    {"method": "ridge", "lam": 0.9, "gamma": 0.9},
    {"kind": "lookahead", "method": "sgd"},
    {"kind": "lookahead", "method": "auto", "lam": 0.9},
    {"kind": "lookahead", "method": "ridge", "ridge": None},
]


@pytest.mark.parametrize("change", FORMS)
async def test_a_value_is_fitted_saved_and_tried(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    change: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("deep/letters" + ("" if change.get("kind") else ".safetensors"))
    weights = {name: tensor.clone() for name, tensor in engine.frozen.lm.state_dict().items()}
    reward = recording_reward(letters)
    report = await fit_value(
        engine, reward, prompts, SAMPLING, replace(QUICK, **change), out, quiet
    )
    assert all(
        tensor.equal(weights[name]) for name, tensor in engine.frozen.lm.state_dict().items()
    ), "the model must not change"
    assert report.samples == 200
    assert (report.ridge is not None) == (report.method in {"ridge", "lookahead, ridge"})
    assert (report.curve[0].beta, report.curve[0].kl) == (0.0, 0.0)
    assert max(p.kl for p in report.curve) > 1
    assert report.suggested_beta in {p.beta for p in report.curve}
    assert [best.n for best in report.best_of_n] == [2, 4, 8]
    stored = json.loads((tmp_path / "deep/letters.report.json").read_text())
    assert stored["suggested_beta"] == report.suggested_beta
    assert stored["held_out"]["r2"] == report.held_out.r2
    assert len(stored["curve"]) == len(report.curve)
    assert stored["vas"]["beta"] == {"letters": report.suggested_beta}
    assert stored["vas"].get("min_p") == change.get("min_p")
    # The running value and its file hold the suggestion.
    summary = read_summary(engine, out)
    assert summary["suggested_beta"] == report.suggested_beta
    assert summary["r2"] == report.held_out.r2
    assert summary["reward"] == "length"
    assert len((tmp_path / "deep/letters.samples.jsonl").read_text().splitlines()) == 201
    # The curve uses the held-out fifth of the prompts in turn.
    assert len(set(reward.prompts[20:])) == 4
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == sorted(
        [out.name, "letters.report.json", "letters.samples.jsonl"]
    )


async def test_a_fit_can_be_repeated_from_its_samples(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    out = tmp_path / "v.safetensors"
    first = await fit_value(engine, recording_reward(letters), prompts, SAMPLING, QUICK, out, quiet)
    tensors, metadata = head.read(str(out))
    assert metadata["reward"] == "length"
    reward = recording_reward(letters)
    second = await fit_value(engine, reward, prompts, SAMPLING, QUICK, out, quiet)
    assert second.held_out == first.held_out
    assert second.best_of_n == first.best_of_n
    # Rows in other batches differ in the last bits.
    betas = [p.beta for p in first.curve]
    assert [p.beta for p in second.curve] == pytest.approx(betas, rel=1e-3)
    assert set(reward.prompts) <= {prompts[i][0]["content"] for i in held_out(prompts, out)}, (
        "nothing must be sampled again"
    )
    again, _ = head.read(str(out))
    assert all(tensor.equal(again[name]) for name, tensor in tensors.items())


def held_out(prompts: Any, out: Path) -> list[int]:
    """Return the indices of the held-out prompts of a fit."""
    file = out.with_suffix(".samples.jsonl")
    lines = file.read_text().splitlines()[1:]
    samples = [parse_reply(line) for line in lines]
    return fitting._held_out_prompts(prompts, samples, SAMPLING.seed)


def parse_reply(line: str) -> ScoredReply:
    value = json.loads(line)
    return ScoredReply(prompt_digest=value.pop("asked"), **value)


async def test_another_reward_scores_the_same_replies(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    first = tmp_path / "first.safetensors"
    await fit_value(engine, recording_reward(letters), prompts, SAMPLING, QUICK, first, quiet)
    source, earlier = read_samples(first.with_suffix(".samples.jsonl"), prompts)
    assert source == SAMPLING
    second = tmp_path / "second.safetensors"
    sampling = replace(SAMPLING, reward="spaces")
    reward = recording_reward(lambda text: float(text.count(" ")))
    report = await fit_value(engine, reward, prompts, sampling, QUICK, second, quiet, earlier)
    assert report.samples == 200
    lines = second.with_suffix(".samples.jsonl").read_text().splitlines()[1:]
    replies = [parse_reply(line) for line in lines]
    assert [reply.text for reply in replies] == [reply.text for reply in earlier]
    assert [reply.reward for reply in replies] == [reply.text.count(" ") for reply in earlier]


async def test_a_form_that_a_lookahead_value_lacks_is_refused_before_sampling(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    reward = recording_reward()
    lookahead = replace(QUICK, kind="lookahead")
    for config, message in (
        (replace(lookahead, min_p=0.1), "^--fit.min_p: 0.1 values any number of tokens"),
        (replace(lookahead, top_k="all"), "^--fit.top_k: 'all' values any number of tokens"),
        (replace(QUICK, min_p=0.1, top_k=5), "^--fit.min_p: takes the place of top_k"),
    ):
        with pytest.raises(ConfigError, match=message):
            await fit_value(engine, reward, prompts, SAMPLING, config, tmp_path / "v", quiet)
    assert reward.prompts == []


async def test_too_few_samples_or_prompts_are_refused(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        InvalidRequest, match=r"samples: 40 are too few.*at least 200: more prompts"
    ):
        await fit_value(
            engine,
            recording_reward(),
            prompts,
            replace(SAMPLING, replies_per_prompt=2),
            QUICK,
            tmp_path / "a",
            quiet,
        )
    with pytest.raises(InvalidRequest, match=r"prompts: 2 different ones are too few.*at least 10"):
        await fit_value(
            engine,
            recording_reward(),
            prompts[:2],
            replace(SAMPLING, replies_per_prompt=100),
            QUICK,
            tmp_path / "b",
            quiet,
        )
    assert os.listdir(tmp_path) == [], "nothing must be sampled"


async def test_equal_prompts_are_held_out_together(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    spaced = [
        [{**messages[0], "content": f" {messages[0]['content']}\r\n"}] for messages in prompts
    ]
    twice = [*prompts, *spaced]
    sampling = replace(SAMPLING, replies_per_prompt=5)
    path = tmp_path / "v.samples.jsonl"
    samples = await sample_replies(engine, recording_reward(), twice, sampling, path, quiet)
    replies, _, _ = read_states(engine.frozen, twice, samples, quiet)
    assert replies.prompt_index.tolist() == [sample.prompt % len(prompts) for sample in samples]
    chosen = fitting._held_out_prompts(twice, samples, SAMPLING.seed)
    assert len(chosen) == round(fitting.HELD_OUT_SHARE * len(prompts))
    assert all(index < len(prompts) for index in chosen)
    same = [prompts[0]] * len(prompts)
    with pytest.raises(InvalidRequest, match=r"prompts: 1 different ones are too few"):
        fitting.check_numbers(same, 10)


async def test_a_constant_reward_is_refused(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="same score"):
        await fit_value(
            engine, recording_reward(lambda _: 3.0), prompts, SAMPLING, QUICK, tmp_path / "v", quiet
        )


async def test_a_reward_of_several_objectives_is_refused(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    reward = recording_reward()
    reward.attributes = ("kind", "true")
    with pytest.raises(InvalidRequest, match="several objectives \\(kind, true\\)"):
        await fit_value(engine, reward, prompts, SAMPLING, QUICK, tmp_path / "v", quiet)
    assert reward.prompts == []


async def test_an_output_that_cannot_be_written_is_refused_before_sampling(
    engine: Any, prompts: Any, recording_reward: Any, quiet: Any, tmp_path: Path
) -> None:
    reward = recording_reward()
    with pytest.raises(ConfigError, match="is a folder"):
        await fit_value(engine, reward, prompts, SAMPLING, QUICK, tmp_path, quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        await fit_value(
            engine,
            reward,
            prompts,
            SAMPLING,
            replace(QUICK, kind="lookahead"),
            tmp_path / "file",
            quiet,
        )
    assert reward.prompts == []


async def test_a_value_model_of_another_tokenizer_is_refused(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    language_model: Any,
    byte_fallback: Any,
) -> None:
    reward, other = recording_reward(), language_model("Llama", tokenizer=byte_fallback)
    for name, message in ((other, "token ids of"), (str(tmp_path / "none"), "cannot be loaded")):
        how = replace(QUICK, kind="lookahead", value_model=name)
        with pytest.raises(ConfigError, match=f"^value_model: .*{message}") as caught:
            await fit_value(engine, reward, prompts, SAMPLING, how, tmp_path / "v", quiet)
        assert name in caught.value.message
    assert reward.prompts == []


async def test_a_value_model_that_lacks_weights_is_refused(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    language_model: Any,
) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(language_model("GPT2"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    how = replace(QUICK, kind="lookahead", value_model=str(folder))
    with pytest.raises(ConfigError, match=r"^value_model: .* no weights for ln_f\.weight"):
        await fit_value(engine, recording_reward(), prompts, SAMPLING, how, tmp_path / "v", quiet)


async def test_a_value_model_may_have_another_architecture(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    language_model: Any,
) -> None:
    how = replace(QUICK, kind="lookahead", value_model=language_model("GPT2"))
    report = await fit_value(
        engine, recording_reward(letters), prompts, SAMPLING, how, tmp_path / "v", quiet
    )
    assert report.curve[-1].kl != 0


async def test_one_value_lm_for_several_rewards(
    engine: Any, prompts: Any, quiet: Any, tmp_path: Path
) -> None:
    texts = [(p, f"the {'cat ' * (i % 4)}") for p in range(12) for i in range(4)]
    samples = {
        "cats": [ScoredReply(p, "", text, "stop", float(text.count("cat"))) for p, text in texts],
        "fewer": [ScoredReply(p, "", text, "stop", -2.0 * text.count("cat")) for p, text in texts],
    }
    fitted = fit_value_lm(
        engine,
        prompts,
        samples,
        replace(QUICK, kind="lookahead", method="sgd", epochs=8),
        0,
        tmp_path / "lm",
        quiet,
    )
    assert len(fitted.fits) == 2
    shared: dict[object, Any] = {}
    values = [LookaheadValue(Lookahead(str(tmp_path / "lm"), name)) for name in samples]
    for value in values:
        value.start(engine.frozen.frozen("tiny"), shared)
    assert values[0].lm is values[1].lm
    samples["fewer"] = samples["fewer"][::-1]
    with pytest.raises(ValueError, match="different replies"):
        fit_value_lm(engine, prompts, samples, QUICK, 0, tmp_path / "other", quiet)


async def test_the_cache_makes_room_for_value_lms(
    engine: Any,
    prompts: Any,
    recording_reward: Any,
    quiet: Any,
    tmp_path: Path,
    language_model: Any,
) -> None:
    await fit_value(
        engine,
        recording_reward(letters),
        prompts,
        SAMPLING,
        replace(QUICK, kind="lookahead", epochs=1),
        tmp_path / "v",
        quiet,
    )
    # A copy of the frozen model needs as much memory per token, so half as many tokens fit.
    value = LookaheadValue(Lookahead(str(tmp_path / "v")))
    value.start(engine.frozen.frozen("tiny"), {})
    assert value.lm is not None
    assert value.lm.cell_bytes == engine.frozen.cell_bytes
    other = Transformers(model=language_model("Llama"), threads=1, kv_cache_gib=0.001).load()
    other.values = {"v": LookaheadValue(Lookahead(str(tmp_path / "v")))}
    await other.start()
    try:
        assert other._started.scheduler.capacity == int(
            0.001 * 2**30 / (2 * engine.frozen.cell_bytes)
        )
    finally:
        await other.close()


def test_the_smallest_held_out_part_has_two_prompts() -> None:
    assert fitting.HELD_OUT_SHARE * fitting.MIN_PROMPTS >= 2

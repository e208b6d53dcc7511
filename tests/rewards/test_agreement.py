"""The agreement of the candidates: by extracted text, by words, by sentence embeddings."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that need it

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer_align.errors import ConfigError, InvalidRequest
from infer_align.rewards import RewardScores
from infer_align.rewards.agreement import (
    Agreement,
    AgreementReward,
    last_number,
    mean_cosines,
    normalized,
    word_vectors,
)
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio


async def score(reward: AgreementReward, *texts: str) -> RewardScores:
    candidates = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]
    return await reward.score([], candidates)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", "42"),
        ("From 3 apples to 1,200.50 dollars", "2401/2"),
        ("a range of 10-12", "12"),
        ("it falls to -007.0", "-7"),
        ("minus zero is −0.0", "0"),
        ("1,2,3", "3"),
        ("12,345,678", "12345678"),
        ("no number", None),
        ("", None),
        ("٣", "3"),
        ("４２", "42"),
        ("one half, or 1/2", "1/2"),
        ("0.50", "1/2"),
        ("-3/6.", "-1/2"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\dfrac34", "3/4"),
        (r"2\frac{1}{2} or 2 \frac12", "5/2"),
        ("on 11/29/2026", "2026"),
        ("in /home/1/2", "2"),
        ("5/0", "0"),
        ("2 1/2", "5/2"),
        ("-2 1/2 degrees", "-5/2"),
        ("2 3/2", "3/2"),
        ("½", "1/2"),
        ("3½ or 1 ¾ cups", "7/4"),
        ("1⁄2", "1/2"),
        ("٢ ١/٢", "5/2"),
        ("3 1/2/2026", "2026"),
        ("1e3", "1000"),
        ("2.5E-1", "1/4"),
        ("it is 3e", "3"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number_has_one_spelling(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_long_numbers_are_compared_exactly() -> None:
    assert last_number("1" * 40) != last_number("1" * 39 + "2")


SAME_RESULT = [("Go.", "go"), ("cafe\u0301", "CAFÉ"), ("a\u00adb", "ab"), ("❤️", "❤"), ("`x`", "x")]
OTHER_RESULTS = [
    ("👍", "👎"),
    ("a > b", "a < b"),
    ("C++", "C#"),
    ("cafe", "cafe\u0301"),
    # Words of Hindi that differ in a vowel, which is a mark on a letter.
    ("कि", "की"),
    ("yes", "!"),
    ("?", "!"),
]


@pytest.mark.parametrize(("text", "other"), SAME_RESULT)
async def test_texts_that_say_the_same_agree(text: str, other: str) -> None:
    scores = await score(Agreement().load(), text, other)
    assert scores.values.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize(("text", "other"), OTHER_RESULTS)
async def test_texts_that_differ_in_symbols_or_marks_do_not_agree(text: str, other: str) -> None:
    scores = await score(Agreement().load(), text, other)
    assert scores.values.tolist() == [[[0.5, 0.5]]]


@pytest.mark.parametrize("by", ["text", "words"])
async def test_empty_answers_agree_with_none(by: Any) -> None:
    scores = await score(Agreement(by=by).load(), "", " \n", "in Paris", "It is in Paris")
    assert scores.values[0, 0, :2].tolist() == [0.0, 0.0]
    assert (scores.values[0, 0, 2:] > 0).all()


async def test_words_of_a_script_without_spaces_are_compared() -> None:
    scores = await score(Agreement(by="words").load(), "答案是四十二。", "四十二", "不知道")
    assert scores.values[0, 0, 1] > 0.3
    assert scores.values[0, 0, 2] == 0


def test_a_text_without_case_and_punctuation() -> None:
    assert normalized("  The Owl,\n eats: Mice! ") == "the owl eats mice"


async def test_the_share_of_candidates_with_the_same_result() -> None:
    reward = Agreement().load()
    scores = await score(reward, "so 4", "It is 4.0!", "5", "Four", "four.")
    np.testing.assert_allclose(scores.values[0, 0], [0.4, 0.4, 0.2, 0.4, 0.4])
    assert scores.usage.reward_tokens == 0


async def test_a_pattern_finds_what_is_compared() -> None:
    reward = Agreement(extract=r"\\boxed\{(.*?)\}").load()
    scores = await score(reward, r"\boxed{1} then \boxed{ 1,000 }", r"\boxed{1000}", "1000")
    np.testing.assert_allclose(scores.values[0, 0], [2 / 3, 2 / 3, 0.0])
    assert scores.notes[:2] == (None, None)
    assert "agrees with none" in (scores.notes[2] or "")
    whole = Agreement(extract="yes|no").load()
    scores = await score(whole, "yes or no", "no", "yes")
    np.testing.assert_allclose(scores.values[0, 0], [2 / 3, 2 / 3, 1 / 3])


@pytest.mark.slow
async def test_a_pattern_that_would_take_years_is_stopped() -> None:
    reward = Agreement(extract=r"(?:x+x+)+y").load()
    with pytest.raises(InvalidRequest, match="takes longer than"):
        await score(reward, "x" * 4000, "x")


@pytest.mark.parametrize("pattern", ["(", "[a", "(?P<x>a)(?P<", "*"])
def test_a_wrong_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"extract: .* is not a regular expression"):
        Agreement(extract=pattern).load()
    with pytest.raises(InvalidRequest, match="is not a regular expression") as caught:
        Agreement().load().with_parameters({"extract": pattern})
    assert caught.value.param == "extract"


@pytest.mark.parametrize(
    "section",
    [{"by": "embeddings"}, {"model": "x"}, {"by": "words", "extract": "a"}],
)
def test_settings_that_do_not_fit_together_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="agreement"):
        Agreement(**section).load()


async def test_a_request_may_bring_its_pattern() -> None:
    reward = Agreement().load().with_parameters({"extract": "[ab]"})
    scores = await score(reward, "a 1", "b 1", "a 2")
    np.testing.assert_allclose(scores.values[0, 0], [2 / 3, 1 / 3, 2 / 3])
    with pytest.raises(InvalidRequest, match='is for by = "text"'):
        Agreement(by="words").load().with_parameters({"extract": "a"})


async def test_words_are_compared_by_their_counts() -> None:
    reward = Agreement(by="words").load()
    scores = await score(reward, "the owl eats mice", "The owl eats mice.", "a b", "")
    np.testing.assert_allclose(scores.values[0, 0], [1 / 3, 1 / 3, 0.0, 0.0])


def test_the_mean_leaves_out_the_text_itself() -> None:
    vectors = word_vectors(["a b", "a c", "a a"])
    root = np.sqrt(0.5)
    expected = [(0.5 + root) / 2, (0.5 + root) / 2, root]
    np.testing.assert_allclose(mean_cosines(vectors), expected)


@pytest.mark.parametrize("by", ["text", "words"])
async def test_the_order_of_the_candidates_does_not_matter(by: Any) -> None:
    texts = ["the owl 1", "an owl 2", "owls eat 2", "x"]
    reward = Agreement(by=by).load()
    forward = await score(reward, *texts)
    backward = await score(reward, *texts[::-1])
    assert (forward.values == backward.values[..., ::-1]).all()


@pytest.mark.parametrize("by", ["text", "words"])
async def test_a_single_candidate_agrees_with_itself(by: Any) -> None:
    scores = await score(Agreement(by=by).load(), "anything")
    assert scores.values.tolist() == [[[1.0]]]
    assert "the only candidate" in (scores.notes[0] or "")


# --- sentence embeddings ---


@pytest.fixture
def encoder(reward_model: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """Return the folder of a tiny random encoder, with further files."""
    pytest.importorskip("torch")

    def make(**files: object) -> Path:
        folder = tmp_path / "encoder"
        shutil.copytree(reward_model("Bert"), folder)
        for name, content in files.items():
            path = folder / {"limits": "sentence_bert_config.json"}.get(
                name, f"1_Pooling/{name}.json"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return folder

    return make


async def test_embeddings_are_means_of_the_token_states(encoder: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(encoder())
    reward = Agreement(by="embeddings", model=folder, device="cpu").load()
    await reward.start()
    texts = ["the owl", "the owl eats mice", "x"]
    scores = await score(reward, *texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = []
    with torch.no_grad():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy())
    products = np.array(vectors) @ np.array(vectors).T
    expected = (products.sum(axis=1) - np.diag(products)) / 2
    np.testing.assert_allclose(scores.values[0, 0], expected, atol=1e-5)
    await reward.close()


async def test_a_long_text_is_cut_with_a_note(encoder: Callable[..., Path]) -> None:
    folder = encoder(limits={"max_seq_length": 8})
    reward = Agreement(by="embeddings", model=str(folder), device="cpu").load()
    await reward.start()
    scores = await score(reward, "abcd" * 20, "a", "")
    assert scores.notes[:2] == ("truncated: read the first 8 tokens", None)
    assert np.isfinite(scores.values).all()


async def test_requests_that_are_compared_at_once_do_not_disturb_each_other(
    encoder: Callable[..., Path],
) -> None:
    folder = encoder(limits={"max_seq_length": 8})
    reward = Agreement(by="embeddings", model=str(folder), device="cpu").load()
    await reward.start()
    texts = ["abcd" * 200, "a", "the owl eats mice " * 40]
    expected = await score(reward, *texts)
    for _ in range(10):
        for scores in await asyncio.gather(*(score(reward, *texts) for _ in range(8))):
            np.testing.assert_allclose(scores.values, expected.values, atol=1e-5)
            assert scores.notes == expected.notes


async def test_empty_answers_are_like_none_by_their_embeddings(
    encoder: Callable[..., Path],
) -> None:
    reward = Agreement(by="embeddings", model=str(encoder()), device="cpu").load()
    await reward.start()
    scores = await score(reward, "", "", "the owl")
    assert scores.values.tolist() == [[[0.0, 0.0, 0.0]]]
    assert scores.notes == ("an empty answer agrees with none",) * 2 + (None,)


async def test_an_encoder_with_another_pooling_is_refused(encoder: Callable[..., Path]) -> None:
    folder = encoder(config={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    reward = Agreement(by="embeddings", model=str(folder), device="cpu").load()
    with pytest.raises(ConfigError, match="pooling_mode_cls_token"):
        await reward.start()


async def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    reward = Agreement(by="embeddings", model=str(tmp_path)).load()
    with pytest.raises(ConfigError, match="agreement"):
        await reward.start()

"""Fitted heads on a frozen encoder: the vectors, the file, and the scores."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that need it

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from infer_align.errors import ConfigError, InvalidRequest, Unavailable
from infer_align.rewards import RewardScores
from infer_align.rewards import _heads as heads
from infer_align.rewards._sentences import EncoderSettings, SentenceEncoder
from infer_align.rewards.embedding import Embedding, EmbeddingReward
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "What do owls eat?"}]


@pytest.fixture
def encoder(reward_model: Callable[..., str]) -> str:
    return reward_model("Bert")


def make_heads(settings: EncoderSettings, views: tuple[Any, ...] = ("answer",)) -> heads.Heads:
    """Return two random heads."""
    loaded = SentenceEncoder(settings, "cpu", "test")
    random = np.random.default_rng(0)
    weights = random.normal(size=(2, len(views) * loaded.size))
    length, bias = random.normal(size=(2, 2)), random.normal(size=2)
    return heads.Heads(settings, loaded.digest(), views, weights, length, bias, {"seed": 1})


async def start(path: Path, **options: Any) -> EmbeddingReward:
    reward = Embedding(str(path), device="cpu", **options).load()
    await reward.start()
    return reward


async def score(reward: EmbeddingReward, *texts: str) -> RewardScores:
    candidates = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]
    return await reward.score(ASK, candidates)


# --- vectors ---


@pytest.mark.parametrize("architecture", ["Bert", "Llama"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_answer_is_pooled_after_its_conversation(
    reward_model: Callable[..., str], architecture: str, pooling: Any
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = reward_model(architecture)
    settings = EncoderSettings(folder, pooling)
    (encoded,) = SentenceEncoder(settings, "cpu", "test").encode([(ASK, "Mice.")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    prompt = tokenizer("What do owls eat?\nassistant: ", add_special_tokens=False)["input_ids"]
    answer = tokenizer("Mice.", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0].numpy()
    rows = states[len(prompt) :]
    expected = rows.mean(axis=0) if pooling == "mean" else rows[-1]
    np.testing.assert_allclose(encoded.answer, expected, atol=1e-5)
    assert encoded.tokens == len(prompt) + len(answer)
    assert encoded.note is None


def test_vectors_do_not_depend_on_the_other_texts(encoder: str) -> None:
    loaded = SentenceEncoder(EncoderSettings(encoder), "cpu", "test")
    dialogues = [(ASK, "Mice. " * n) for n in range(40)]
    together = loaded.encode(dialogues)
    # The empty answer, the longest one, and some between them.
    for i in (0, 1, 2, 10, 25, 39):
        (alone,) = loaded.encode([dialogues[i]])
        np.testing.assert_allclose(alone.answer, together[i].answer, atol=1e-5)
    assert not together[0].answer.any()


def test_a_long_answer_loses_its_end_and_a_long_conversation_its_beginning(encoder: str) -> None:
    loaded = SentenceEncoder(EncoderSettings(encoder, max_length=40), "cpu", "test")
    long = [{"role": "user", "content": "x" * 99 + "What?"}]
    short = [{"role": "user", "content": "yWhat?"}]
    cut, plain = loaded.encode([(long, "Mice."), (short, "Mice.")])
    assert cut.tokens == 40
    assert (cut.note or "").startswith("truncated: read 40 of ")
    assert plain.note is None
    first, second = loaded.encode([(long, "a" * 90), (long, "a" * 90 + "b")])
    np.testing.assert_allclose(first.answer, second.answer)
    assert second.cut == first.cut + 1


def test_a_lower_layer_is_the_state_that_the_whole_model_has_there(
    reward_model: Callable[..., str],
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = reward_model("Bert")
    loaded = SentenceEncoder(EncoderSettings(folder, layer=1), "cpu", "test")
    (encoded,) = loaded.encode([([], "Mice.")])
    ids = AutoTokenizer.from_pretrained(folder)("Mice.", return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(**ids, output_hidden_states=True)
    expected = output.hidden_states[1][0].mean(dim=0).numpy()
    np.testing.assert_allclose(encoded.answer, expected, atol=1e-5)
    for layer in (0, 99):
        with pytest.raises(ConfigError, match="has the layers 1 to"):
            SentenceEncoder(EncoderSettings(folder, layer=layer), "cpu", "test")


def test_the_digest_is_that_of_the_vectors(reward_model: Callable[..., str]) -> None:
    def digest(**settings: Any) -> str:
        return SentenceEncoder(EncoderSettings(**settings), "cpu", "test").digest()

    first = reward_model("Bert")
    assert digest(model=first) == digest(model=first)
    others = [{"model": reward_model("Bert", seed=1)}, {"model": first, "pooling": "last"}]
    others += [{"model": first, "layer": 1}, {"model": first, "max_length": 20}]
    assert len({digest(model=first), *(digest(**each) for each in others)}) == 5


# --- features ---


def test_an_interaction_is_the_product_of_prompt_and_answer(encoder: str) -> None:
    loaded = SentenceEncoder(EncoderSettings(encoder), "cpu", "test")
    (encoded,) = loaded.encode([(ASK, "Mice.")])
    features = heads.answer_features([encoded], ("answer", "interaction"), loaded.size)[0]
    answer = encoded.answer / np.linalg.norm(encoded.answer)
    prompt = encoded.prompt / np.linalg.norm(encoded.prompt)
    np.testing.assert_allclose(features[: loaded.size], answer)
    np.testing.assert_allclose(features[loaded.size :], answer * prompt * loaded.size**0.5)


def test_the_length_is_that_of_the_text() -> None:
    log = np.log(6)
    np.testing.assert_allclose(heads.length_features(["abcde", ""]), [[log, log**2], [0, 0]])


# --- the file and the reward ---


@pytest.mark.parametrize("views", [("answer",), ("answer", "interaction")])
async def test_scores_are_those_of_the_heads(encoder: str, tmp_path: Path, views: Any) -> None:
    path = tmp_path / "r.safetensors"
    fitted = make_heads(EncoderSettings(encoder), views)
    heads.write(path, fitted)
    reward = await start(path)
    scores = await score(reward, "Mice.", "", "Hay and more hay.")
    loaded = SentenceEncoder(fitted.encoder, "cpu", "test")
    encoded = loaded.encode([(ASK, text) for text in ("Mice.", "", "Hay and more hay.")])
    features = heads.answer_features(encoded, views, loaded.size)
    lengths = heads.length_features(["Mice.", "", "Hay and more hay."])
    expected = fitted.weights @ features.T + fitted.length @ lengths.T + fitted.bias[:, None]
    np.testing.assert_allclose(scores.values[0], expected, atol=1e-6)
    assert reward.members == ("head0", "head1")
    assert scores.usage.reward_tokens == sum(each.tokens for each in encoded)
    again = await score(reward, "Mice.", "", "Hay and more hay.")
    assert (again.values == scores.values).all()
    await reward.close()
    with pytest.raises(Unavailable):
        await score(reward, "x")


async def test_a_long_text_has_a_note(encoder: str, tmp_path: Path) -> None:
    heads.write(tmp_path / "r", make_heads(EncoderSettings(encoder, max_length=40)))
    reward = await start(tmp_path / "r")
    scores = await score(reward, "Mice.", "Mice. " * 50)
    assert scores.notes[0] is None
    assert "truncated: read 40 of" in (scores.notes[1] or "")
    await reward.close()


async def test_an_image_is_refused_before_anything_is_drawn(encoder: str, tmp_path: Path) -> None:
    heads.write(tmp_path / "r", make_heads(EncoderSettings(encoder)))
    reward = await start(tmp_path / "r")
    with pytest.raises(InvalidRequest, match="reads text only"):
        reward.check_conversation("x", [{"role": "user", "content": [{"type": "image_url"}]}])
    await reward.close()


async def test_another_encoder_is_refused(
    encoder: str, tmp_path: Path, reward_model: Callable[..., str]
) -> None:
    heads.write(tmp_path / "r", make_heads(EncoderSettings(encoder)))
    with pytest.raises(ConfigError, match="were fitted on"):
        await start(tmp_path / "r", encoder=reward_model("Bert", seed=1))
    await (await start(tmp_path / "r", encoder=encoder)).close()


async def test_a_file_of_another_kind_is_refused(encoder: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("no")
    fitted = make_heads(EncoderSettings(encoder))
    heads.write(tmp_path / "nan", replace(fitted, bias=np.array([np.nan, 0.0])))
    heads.write(tmp_path / "views", replace(fitted, views=("unknown",)))
    heads.write(tmp_path / "members", replace(fitted, bias=np.zeros(3)))
    for name, reason in (
        ("other", "has the format null"),
        ("text", "cannot be read"),
        ("none", "cannot be read"),
        ("nan", "not finite"),
        ("views", "are unknown"),
        ("members", "different numbers of members"),
    ):
        with pytest.raises(ConfigError, match=reason):
            await start(tmp_path / name)

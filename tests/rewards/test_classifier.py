"""Reward model scores equal a direct forward, whatever is in the batch, and failures stay local."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer_align.errors import ConfigError, InvalidRequest, Unavailable
from infer_align.rewards._conversation import turns
from infer_align.rewards._scaling import Scaling, scale_scores
from infer_align.rewards.classifier import Classifier
from infer_align.types import Candidate

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
ASK = [{"role": "user", "content": "the cat"}]
TEXTS = [
    "sat",
    "a big red ball is in the box with the small blue hat",
    "",
    "the dog ran to the sun!",
    "é你😀",
]


def candidates(texts=TEXTS) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]


async def started(**section):
    reward = Classifier(**{"dtype": "float32", **section}).load()
    await reward.start()
    return reward


def direct(path: str, texts=TEXTS, messages=ASK, limit: int = 10_000) -> np.ndarray:
    """Return [labels, N] logits of one conversation at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = []
    for text in texts:
        turns = [*messages, {"role": "assistant", "content": text}]
        conversation = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(conversation, add_special_tokens=False)["input_ids"][-limit:]
        mask = torch.ones((1, len(ids)), dtype=torch.long)
        with torch.inference_mode():
            output = model(torch.tensor([ids]), attention_mask=mask)
        rows.append(output.logits[0].numpy())
    return np.stack(rows, axis=1)


def changed(path: str, copy: Path, change) -> str:
    """Copy a model and change its weights."""
    shutil.copytree(path, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def same(values: np.ndarray, expected: np.ndarray) -> bool:
    return values.shape == expected.shape and np.allclose(values, expected, atol=1e-5, rtol=1e-4)


async def test_equal_answers_are_read_once_and_have_equal_scores(reward_model):
    reward = await started(model=reward_model("Llama", 1))
    batches: list[int] = []
    reward._models[0].model.register_forward_hook(
        lambda _module, _args, output: batches.append(len(output.logits))
    )
    texts = ["sat", "a big red ball", "sat", "", "a big red ball", "sat", ""]
    scores = await reward.score(ASK, candidates(texts))
    distinct = await reward.score(ASK, candidates(["sat", "a big red ball", ""]))
    await reward.close()
    assert batches == [3, 3]
    first = [texts.index(text) for text in texts]
    assert np.array_equal(scores.values, scores.values[:, :, first])
    assert same(scores.values[:, :, [0, 1, 3]], distinct.values)
    assert scores.usage.reward_tokens > distinct.usage.reward_tokens


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral", "GPT2", "Bert", "Gemma2"])
@pytest.mark.parametrize("labels", [1, 3])
async def test_scores_equal_a_direct_forward(architecture, labels, reward_model):
    path = reward_model(architecture, labels)
    reward = await started(model=path, batch_size=3)
    scores = await reward.score(ASK, candidates())
    assert same(scores.values[0], direct(path))
    assert len(reward.members) == labels
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = 0
    for text in TEXTS:
        conversation = f"<user>the cat</s><assistant>{text}</s>"
        tokens += len(tokenizer(conversation, add_special_tokens=False)["input_ids"])
    assert scores.usage.reward_tokens == tokens
    assert scores.notes == (None,) * len(TEXTS)
    await reward.close()


@pytest.mark.parametrize("pad", [None, 0, 1])
async def test_padding_is_never_read_as_text_nor_text_as_padding(reward_model, pad):
    # A conversation ends in </s>, token 1. A model without a padding token reads that last token.
    path = reward_model("Llama", pad_token_id=pad)
    reward = await started(model=path)
    assert same((await reward.score(ASK, candidates())).values[0], direct(path))
    await reward.close()


async def test_the_rotary_factors_of_a_text_are_those_of_its_own_length(reward_model):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 32,
    }
    path = reward_model("Llama", rope_parameters=rope)
    reward = await started(model=path)
    scores = await reward.score(ASK, candidates())
    assert same(scores.values[0], direct(path))
    await reward.close()


async def test_attributes_are_rows_and_models_are_members(reward_model):
    paths = tuple(reward_model("Llama", 2, seed=s) for s in (1, 2, 3))
    reward = await started(models=paths, attributes=("helpful", "brief"))
    scores = await reward.score(ASK, candidates())
    assert scores.values.shape == (2, 3, len(TEXTS))
    assert same(scores.values, np.stack([direct(p) for p in paths], axis=1))
    assert reward.attributes == ("helpful", "brief")
    await reward.close()


async def test_the_labels_of_several_models_are_members_of_one_ensemble(reward_model):
    paths = (reward_model("Llama", 1), reward_model("Bert", 2))
    reward = await started(models=paths)
    scores = await reward.score(ASK, candidates())
    assert same(scores.values[0], np.concatenate([direct(p) for p in paths]))
    assert len(reward.members) == 3
    assert reward.members[1].endswith("#0")
    await reward.close()


async def test_batches_are_filled_across_requests(reward_model):
    reward = await started(model=reward_model(), batch_size=8)
    shapes = []
    reward._models[0].model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(kw["input_ids"].shape[0]), with_kwargs=True
    )
    requests = [candidates([f"{text} {i}" for text in TEXTS]) for i in range(8)]
    alone = [await reward.score(ASK, request) for request in requests]
    shapes.clear()
    results = await asyncio.gather(*(reward.score(ASK, request) for request in requests))
    assert sum(shapes) == 8 * len(TEXTS)
    assert len(shapes) == 5, "8 requests share 5 full batches"
    for scores, expected in zip(results, alone, strict=True):
        assert same(scores.values, expected.values)
    await reward.close()


async def test_a_long_text_loses_its_beginning_and_a_note_says_so(reward_model):
    path = reward_model("Bert", max_position_embeddings=32)
    for section, limit in [({}, 32), ({"max_length": 16}, 16)]:
        reward = await started(model=path, **section)
        scores = await reward.score(ASK, candidates())
        assert same(scores.values[0], direct(path, limit=limit))
        assert scores.notes[1].startswith(f"truncated: read the last {limit} of ")
        assert (scores.notes[2] is None) == (limit == 32)
        await reward.close()


async def test_the_maximum_of_the_tokenizer_is_a_limit(reward_model, byte_level, tmp_path):
    shutil.copytree(reward_model("Bert"), tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path)
    reward = await started(model=str(tmp_path))
    assert "last 20 of" in (await reward.score(ASK, candidates())).notes[1]
    await reward.close()


async def test_a_refused_conversation_is_not_scored_and_others_are(reward_model):
    path = reward_model()
    reward = await started(model=path)
    wizard = [{"role": "wizard", "content": "abracadabra"}]
    with pytest.raises(InvalidRequest, match=r"align.rewards.x: .* roles are system") as error:
        reward.check_conversation("align.rewards.x", wizard)
    assert error.value.param == "align.rewards.x"
    reward.check_conversation("align.rewards.x", ASK)
    refused, scored = await asyncio.gather(
        reward.score(wizard, candidates()), reward.score(ASK, candidates())
    )
    assert np.isnan(refused.values).all()
    assert all("roles are system" in note for note in refused.notes)
    assert refused.usage.reward_tokens == 0
    assert same(scored.values[0], direct(path))
    await reward.close()


CALL = {"id": "1", "type": "function", "function": {"name": "sat", "arguments": '{"on": "mat"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
AS_TEXT = '<tool_call>\n{"name": "sat", "arguments": {"on": "mat"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("messages", "plain"),
    [
        ([{"role": "developer", "content": "a"}, *ASK], [{"role": "system", "content": "a"}, *ASK]),
        (
            [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *ASK],
            [{"role": "system", "content": "a\n\nb"}, *ASK],
        ),
        (
            [*ASK, {"role": "assistant", "content": None, "refusal": "no"}, *ASK],
            [*ASK, {"role": "assistant", "content": "no"}, *ASK],
        ),
        (
            [*ASK, CALLED, {"role": "tool", "tool_call_id": "1", "content": "dog"}],
            [
                *ASK,
                {"role": "assistant", "content": AS_TEXT},
                {"role": "user", "content": "<tool_response>\ndog\n</tool_response>"},
            ],
        ),
        (
            [{"role": "user", "content": "the cat", "name": None, "audio": None}],
            ASK,
        ),
    ],
)
async def test_a_conversation_is_read_in_one_form(reward_model, messages, plain):
    path = reward_model()
    reward = await started(model=path)
    reward.check_conversation("x", messages)
    scores = (await reward.score(messages, candidates())).values[0]
    assert same(scores, direct(path, messages=plain))
    await reward.close()


async def test_candidates_that_differ_in_their_calls_have_different_scores(reward_model):
    path = reward_model()
    reward = await started(model=path)
    ran = {"id": "1", "type": "function", "function": {"name": "ran", "arguments": "{}"}}
    answers = [
        Candidate(0, {"message": CALLED}),
        Candidate(1, {"message": {**CALLED, "tool_calls": [ran]}}),
        Candidate(2, {"message": {"content": None, "refusal": "no", "reasoning": "hm"}}),
    ]
    scores = (await reward.score(ASK, answers)).values[0]
    texts = [AS_TEXT, '<tool_call>\n{"name": "ran", "arguments": {}}\n</tool_call>', "no"]
    assert same(scores, direct(path, texts))
    assert len(set(scores[0].tolist())) == 3
    await reward.close()


async def test_an_image_is_refused_by_the_name_of_the_reward(reward_model):
    reward = await started(model=reward_model())
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    messages = [*ASK, {"role": "user", "content": [image]}]
    with pytest.raises(InvalidRequest, match=r"messages\[1\] has a part of type 'image_url'"):
        reward.check_conversation("align.rewards.x", messages)
    await reward.close()


async def test_invalid_unicode_is_not_scored(reward_model):
    reward = await started(model=reward_model())
    scores = await reward.score(ASK, candidates(["fine", "a\ud800"]))
    assert np.isnan(scores.values[0, 0]).tolist() == [False, True]
    assert scores.notes[1]
    await reward.close()


async def test_text_parts_are_joined(reward_model):
    path = reward_model()
    reward = await started(model=path)
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}],
        }
    ]
    assert same((await reward.score(parts, candidates())).values[0], direct(path))
    await reward.close()


async def test_without_a_chat_template_the_turns_are_plain_text(reward_model, byte_level, tmp_path):
    shutil.copytree(reward_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    reward = await started(model=str(tmp_path))
    scores = await reward.score(ASK, candidates(["sat"]))
    assert scores.usage.reward_tokens == len(byte_level("the cat\n\nsat")["input_ids"])
    assert np.isfinite(scores.values).all()
    assert np.isfinite((await reward.score([], candidates(["a completion"]))).values).all()
    empty = await reward.score([], candidates([""]))
    assert np.isnan(empty.values).all()
    assert empty.notes[0]
    await reward.close()


async def test_a_text_that_the_model_cannot_read_fails_alone(reward_model):
    path = reward_model()
    reward = await started(model=path)
    model = reward._models[0].model
    width = len(reward._models[0].encoder.encode(turns(ASK, candidates()[1])).ids)

    def fail(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == width:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    failing, other = await asyncio.gather(
        reward.score(ASK, candidates()), reward.score(ASK, candidates(["fine"]))
    )
    expected = direct(path)
    expected[:, 1] = np.nan
    np.testing.assert_allclose(failing.values[0], expected, atol=1e-5)
    assert failing.notes[1].endswith("RuntimeError: out of memory")
    assert failing.notes[0] is None
    assert same(other.values[0], direct(path, ["fine"]))
    await reward.close()


class Hold:
    """Holds every forward of a reward's first model until it is released."""

    def __init__(self, reward) -> None:
        self._inside = threading.Event()
        self._release = threading.Event()
        reward._models[0].model.register_forward_pre_hook(self._wait)

    def _wait(self, module, args) -> None:
        self._inside.set()
        self._release.wait(60)

    async def started(self) -> None:
        await asyncio.to_thread(self._inside.wait, 60)

    def release(self) -> None:
        self._release.set()


async def test_a_cancelled_request_does_not_affect_others(reward_model):
    path = reward_model()
    reward = await started(model=path, batch_size=5)
    hold = Hold(reward)
    scored = []
    reward._models[0].model.register_forward_pre_hook(
        lambda m, a, kw: scored.append(len(kw["input_ids"])), with_kwargs=True
    )
    tasks = [asyncio.create_task(reward.score(ASK, candidates())) for _ in range(3)]
    await hold.started()
    # The first request is being scored, the second waits.
    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.sleep(0)
    hold.release()
    assert same((await tasks[2]).values[0], direct(path))
    assert sum(scored) == 2 * len(TEXTS), "the second request was never scored"
    assert tasks[0].cancelled()
    assert not reward._waiting
    await reward.close()


async def test_closing_fails_waiting_and_later_requests(reward_model):
    reward = await started(model=reward_model(), batch_size=2)
    hold = Hold(reward)
    task = asyncio.create_task(reward.score(ASK, candidates(["a"] * 6)))
    await hold.started()
    closing = asyncio.create_task(reward.close())
    # One turn of the event loop lets `close` fail the waiting texts.
    await asyncio.sleep(0)
    hold.release()
    await closing
    with pytest.raises(Unavailable):
        await task
    with pytest.raises(Unavailable):
        await reward.score(ASK, candidates())


async def test_a_language_model_is_refused(language_model):
    with pytest.raises(
        ConfigError, match=r"not a complete sequence classifier.* no weights for score.weight\."
    ):
        await started(model=language_model("GPT2"))


@pytest.mark.parametrize(
    ("architecture", "weight"),
    [
        ("Llama", "score.weight"),
        ("Llama", "model.layers.1.mlp.up_proj.weight"),
        ("GPT2", "transformer.wte.weight"),
        ("Bert", "classifier.bias"),
    ],
)
async def test_a_classifier_without_one_of_its_weights_is_refused(
    architecture, weight, reward_model, tmp_path
):
    def remove(weights):
        del weights[weight]

    path = changed(reward_model(architecture), tmp_path / "rm", remove)
    with pytest.raises(ConfigError, match=f"its checkpoint has no weights for {weight}"):
        await started(model=path)


async def test_weights_of_a_wrong_size_are_refused(reward_model, tmp_path):
    def widen(weights):
        weights["score.weight"] = torch.zeros(3, weights["score.weight"].shape[1])

    path = changed(reward_model("Llama"), tmp_path / "rm", widen)
    with pytest.raises(ConfigError, match=r"score.weight \(saved \[3, 32\], needed \[1, 32\]\)"):
        await started(model=path)


async def test_weights_that_are_tied_do_not_count_as_missing(reward_model):
    path = reward_model("Bart")
    weights = load_file(Path(path) / "model.safetensors")
    assert "model.decoder.embed_tokens.weight" not in weights
    reward = await started(model=path)
    assert np.isfinite((await reward.score(ASK, candidates(["sat"]))).values).all()


async def test_a_broken_file_is_refused(reward_model, tmp_path):
    path = changed(reward_model("Llama"), tmp_path / "rm", lambda _: None)
    (tmp_path / "rm" / "model.safetensors").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be loaded as a sequence classifier"):
        await started(model=path)


async def test_a_model_that_does_not_fit_its_section_is_refused(reward_model, tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        await started(model=str(tmp_path))
    with pytest.raises(ConfigError, match="2 names for the 3 labels"):
        await started(model=reward_model("Llama", 3), attributes=("a", "b"))
    for wrong in (Classifier(), Classifier(model="a", models=("b",))):
        with pytest.raises(ConfigError, match="either model or models"):
            wrong.load()


SENTIMENT = {0: "NEGATIVE", 1: "POSITIVE"}
STARS = {0: "bad", 1: "fair", 2: "good"}
SINGLE = "single_label_classification"
MULTIPLE = "multi_label_classification"


def classes(reward_model, names, problem=None) -> str:
    """Return the folder of a classifier whose labels have names."""
    label2id = {name: index for index, name in names.items()}
    fields = {"id2label": names, "label2id": label2id, "problem_type": problem}
    return reward_model("Bert", len(names), **fields)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (SENTIMENT, None),
        (SENTIMENT, SINGLE),
        (STARS, None),
        (STARS, "regression"),
        ({0: "toxic", 1: "rude"}, MULTIPLE),
        ({0: "LABEL_0", 1: "LABEL_1"}, SINGLE),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, MULTIPLE),
    ],
)
async def test_classes_without_a_meaning_are_refused(reward_model, names, problem):
    path = classes(reward_model, names, problem)
    with pytest.raises(ConfigError) as raised:
        await started(model=path)
    message = raised.value.message
    assert ", ".join(names.values()) in message
    assert f'label = "{names[len(names) - 1]}"' in message
    assert "attributes = [...]" in message
    assert "members = true" in message
    as_members = await started(model=path, members=True)
    assert len(as_members.members) == len(names)
    assert as_members.warnings == ()
    await as_members.close()


@pytest.mark.parametrize("problem", [None, SINGLE])
@pytest.mark.parametrize("names", [SENTIMENT, STARS])
async def test_the_score_of_one_class_is_its_log_odds(reward_model, names, problem):
    path = classes(reward_model, names, problem)
    logits = torch.from_numpy(direct(path))
    for index, label in names.items():
        reward = await started(model=path, label=label)
        scores = await reward.score(ASK, candidates())
        expected = torch.logit(torch.softmax(logits.double(), 0)[index])
        assert same(scores.values[0, 0], expected.numpy())
        assert scores.values.shape == (1, 1, len(TEXTS))
        assert len(reward.members) == 1
        await reward.close()


@pytest.mark.parametrize("problem", [MULTIPLE, "regression"])
async def test_the_score_of_an_independent_label_is_its_logit(reward_model, problem):
    path = classes(reward_model, STARS, problem)
    reward = await started(model=path, label="fair")
    assert same((await reward.score(ASK, candidates())).values[0, 0], direct(path)[1])
    await reward.close()


async def test_one_label_of_several_models_is_an_ensemble(reward_model):
    # The order of the labels may differ between the models.
    paths = (classes(reward_model, SENTIMENT), classes(reward_model, {0: "POSITIVE", 1: "x"}))
    reward = await started(models=paths, label="POSITIVE")
    scores = await reward.score(ASK, candidates([*TEXTS, "a\ud800"]))
    first, second = (direct(path) for path in paths)
    expected = np.stack([first[1] - first[0], second[0] - second[1]])
    assert same(scores.values[0, :, :-1], expected)
    assert np.isnan(scores.values[0, :, -1]).all()
    assert len(reward.members) == 2
    await reward.close()


async def test_labels_without_names_are_members_with_a_warning(reward_model):
    reward = await started(model=reward_model("Bert", 5))
    assert len(reward.members) == 5
    assert "LABEL_0, LABEL_1, LABEL_2, LABEL_3, LABEL_4 are averaged" in reward.warnings[0]
    await reward.close()
    reward = await started(model=reward_model("Bert", 1, problem_type="regression"))
    assert reward.warnings == ()
    await reward.close()


async def test_a_wrong_label_is_refused(reward_model):
    path = classes(reward_model, SENTIMENT)
    with pytest.raises(ConfigError, match="did you mean 'POSITIVE'"):
        await started(model=path, label="POSTIVE")
    with pytest.raises(ConfigError, match="set one of them"):
        Classifier(model=path, label="POSITIVE", members=True).load()
    with pytest.raises(ConfigError, match="set one of them"):
        Classifier(model=path, label="POSITIVE", attributes=("a", "b")).load()


async def test_objectives_are_scaled_by_the_section(reward_model):
    path = reward_model(labels=2)
    raw = await started(model=path, attributes=("a", "b"))
    scaled = await started(
        model=path, attributes=("a", "b"), scaling={"b": Scaling(mean=1.0, std=4.0)}
    )
    before = await raw.score(ASK, candidates())
    after = await scaled.score(ASK, candidates())
    np.testing.assert_allclose(after.values[0], before.values[0], atol=1e-6)
    np.testing.assert_allclose(after.values[1], (before.values[1] - 1.0) / 4.0, atol=1e-6)


def test_scaling_converts_the_labels_of_the_published_model() -> None:
    """The scaling (score - 10) / 20 maps 0..100 to HelpSteer's 0..4."""
    vectors = Path(__file__).parents[1] / "data" / "dpa_public.json"
    cases = json.loads(vectors.read_text(encoding="utf-8"))["helpsteer_conversion"]
    names = tuple("abcde")
    scaling = dict.fromkeys(names, Scaling(mean=10.0, std=20.0))
    for case in cases:
        values = np.array(case["score_0_100"])[:, None, None]
        converted = scale_scores(values, scaling, names)[:, 0, 0]
        np.testing.assert_allclose(converted, case["helpsteer_0_4"], atol=1e-9)
    assert len(cases) >= 8


async def test_small_reward_models_compute_with_one_thread(reward_model, several_threads):
    reward = await started(model=reward_model("Llama"))
    counts = set()
    reward._models[0].model.register_forward_pre_hook(
        lambda *_: counts.add(torch.get_num_threads())
    )
    await reward.score(ASK, candidates())
    await reward.close()
    assert counts == {1}
    assert torch.get_num_threads() == several_threads

"""A reward model reads a text as transformers would, truncated without losing special tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from infer_align.errors import ConfigError
from infer_align.rewards import start_reward
from infer_align.rewards._encoding import Encoder, find_template
from infer_align.rewards.classifier import Classifier, ClassifierReward
from infer_align.types import Candidate

pytestmark = [
    pytest.mark.anyio,
    # transformers' DeBERTa is compiled by TorchScript.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.slow,
]

POSITIONS = 64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz"]
TURN = "{{ '<' + m.role + '> ' + m.content + ' ' }}"
TURNS = "{% for m in messages %}" + TURN + "{% endfor %}"
FRAMED = "[CLS] " + TURNS + "[SEP]"
COMMON = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
    "num_labels": 1,
}
# (architecture, its fields, the number of tokens that it can read; None for any number)
FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "bert": ("Bert", {}, 64),
    "roberta": ("Roberta", {}, 63),
    "roberta with padding 1": ("Roberta", {"pad_token_id": 1}, 62),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1}, 62),
    "camembert": ("Camembert", {"pad_token_id": 1}, 62),
    "mpnet": ("MPNet", {"pad_token_id": 1}, 62),
    "longformer": ("Longformer", {"pad_token_id": 1, "attention_window": [8, 8]}, 62),
    "distilbert": ("DistilBert", {}, 64),
    "albert": ("Albert", {}, 64),
    "electra": ("Electra", {}, 64),
    "deberta with absolute positions": ("DebertaV2", {"relative_attention": True}, 64),
    "deberta with relative positions": (
        "DebertaV2",
        {
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
        },
        None,
    ),
    "modernbert": ("ModernBert", {}, 64),
    "llama": ("Llama", {"num_key_value_heads": 2}, 64),
    "gpt2": ("GPT2", {"pad_token_id": None}, 64),
}


def letters(count: int, seed: int = 0) -> str:
    """Return a text of `count` tokens."""
    generator = np.random.default_rng(seed)
    return " ".join(WORDS[6 + index] for index in generator.integers(26, size=count))


@pytest.fixture(scope="session")
def word_level() -> tf.PreTrainedTokenizerFast:
    """Return a tokenizer of letters that puts [CLS] and [SEP] around a text, without a template."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture
def save(
    tmp_path_factory: pytest.TempPathFactory, word_level: tf.PreTrainedTokenizerFast
) -> Callable[..., str]:
    """Return a function that saves a random classifier with a tokenizer, and returns its folder."""

    def make(family: str = "bert", template: object = None, **attributes: Any) -> str:
        name, fields, _ = FAMILIES[family]
        sizes = {**COMMON, "max_position_embeddings": POSITIONS, **fields}
        torch.manual_seed(1)
        config = getattr(tf, f"{name}Config")(**sizes)
        model = tf.AutoModelForSequenceClassification.from_config(config)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer = Tokenizer.from_str(word_level.backend_tokenizer.to_str())
        copy = tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **{**word_level.special_tokens_map, **attributes}
        )
        copy.chat_template = template
        copy.save_pretrained(folder)
        return str(folder)

    return make


async def started(path: str, **section: Any) -> ClassifierReward:
    reward = Classifier(model=path, dtype="float32", **section).load()
    await reward.start()
    return reward


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]


def reference(
    path: str, texts: list[str], length: int | None, side: str = "right", *, special: bool = True
) -> np.ndarray[Any, Any]:
    """Return the scores by transformers' own tokenization and truncation, one text at a time."""
    tokenizer = tf.AutoTokenizer.from_pretrained(path, truncation_side=side)
    model = tf.AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = []
    for text in texts:
        encoded = tokenizer(
            text,
            truncation=True,
            max_length=length,
            add_special_tokens=special,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            scores.append(float(model(**encoded).logits[0, 0]))
    return np.array(scores)


@pytest.mark.parametrize("family", FAMILIES)
async def test_long_texts_are_truncated_as_transformers_does(
    family: str, save: Callable[..., str]
) -> None:
    path = save(family)
    limit = FAMILIES[family][2]
    room = (limit or POSITIONS) - 2
    # Exactly the limit, one token more, ten times as many, and the short ones of a mixed batch.
    texts = [letters(count, count) for count in (room, room + 1, 10 * POSITIONS, 80, 0, 3)]
    reward = await started(path)
    scores = await reward.score([], candidates(*texts))
    np.testing.assert_allclose(scores.values[0, 0], reference(path, texts, limit), atol=1e-5)
    truncated = [note is not None for note in scores.notes]
    assert truncated == [limit is not None and len(text.split()) > room for text in texts]
    if limit:
        assert scores.notes[1] == f"truncated: read the first {limit} of {limit + 1} tokens"
    await reward.close()


async def test_the_tokenizers_side_of_truncation_is_used(save: Callable[..., str]) -> None:
    path = save(truncation_side="left")
    texts = [letters(80, seed) for seed in range(4)]
    reward = await started(path)
    scores = await reward.score([], candidates(*texts))
    expected = reference(path, texts, POSITIONS, "left")
    np.testing.assert_allclose(scores.values[0, 0], expected, atol=1e-5)
    assert scores.notes[0] == "truncated: read the last 64 of 82 tokens"
    await reward.close()


@pytest.mark.parametrize(("configured", "limit"), [(8, 8), (20, 20), (4, 64), (10**30, 64)])
async def test_the_tokenizers_maximum_counts_if_it_makes_sense(
    configured: int, limit: int, save: Callable[..., str]
) -> None:
    path = save(model_max_length=configured)
    texts = [letters(80)]
    reward = await started(path)
    scores = await reward.score([], candidates(*texts))
    np.testing.assert_allclose(scores.values[0, 0], reference(path, texts, limit), atol=1e-5)
    await reward.close()


@pytest.mark.parametrize("words", [40, 62, 200])
async def test_the_answer_is_read_however_long_the_prompt_is(
    words: int, save: Callable[..., str]
) -> None:
    path = save()
    prompt = letters(words)
    answers = ["a b c", "x y z"]
    reward = await started(path)
    scores = await reward.score([{"role": "user", "content": prompt}], candidates(*answers))
    texts = [f"{prompt}\n\n{answer}" for answer in answers]
    expected = reference(path, texts, POSITIONS, "left")
    np.testing.assert_allclose(scores.values[0, 0], expected, atol=1e-5)
    assert expected[0] != expected[1]
    await reward.close()


@pytest.mark.parametrize("words", [3, 50, 61, 500])
async def test_a_chat_template_keeps_its_special_tokens_and_the_answer(
    words: int, save: Callable[..., str]
) -> None:
    path = save(template=FRAMED)
    prompt = letters(words)
    answers = ["a b c", "x y z"]
    reward = await started(path)
    assert reward.warnings == ()
    scores = await reward.score([{"role": "user", "content": prompt}], candidates(*answers))
    # transformers truncates the content alone, if it is the one that adds the special tokens.
    texts = [f"<user> {prompt} <assistant> {answer}" for answer in answers]
    expected = reference(path, texts, POSITIONS, "left")
    np.testing.assert_allclose(scores.values[0, 0], expected, atol=1e-5)
    await reward.close()


@pytest.mark.parametrize("words", [3, 500])
async def test_special_tokens_are_added_on_request(words: int, save: Callable[..., str]) -> None:
    path = save(template=TURNS)
    prompt, answers = letters(words), ["a b c", "x y z"]
    messages = [{"role": "user", "content": prompt}]
    texts = [f"<user> {prompt} <assistant> {answer}" for answer in answers]
    for special in (True, False):
        reward = await started(path, add_special_tokens=special)
        scores = await reward.score(messages, candidates(*answers))
        expected = reference(path, texts, POSITIONS, "left", special=special)
        np.testing.assert_allclose(scores.values[0, 0], expected, atol=1e-5)
        # Without the setting, the operator is warned.
        assert ["adds [CLS] [SEP]" in each for each in reward.warnings] == [True] * (not special)
        await reward.close()


async def test_a_token_that_the_model_does_not_know_fails_alone(
    save: Callable[..., str], word_level: tf.PreTrainedTokenizerFast
) -> None:
    path = save()
    tokenizer = tf.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["emoji"])
    tokenizer.save_pretrained(path)
    reward = await started(path)
    unreadable, readable = await asyncio.gather(
        reward.score([], candidates("a emoji", "b")), reward.score([], candidates("c"))
    )
    assert np.isnan(unreadable.values[0, 0]).tolist() == [True, False]
    assert unreadable.notes[0] is not None
    assert "token id 32" in unreadable.notes[0]
    expected = reference(path, ["c"], POSITIONS)
    np.testing.assert_allclose(readable.values[0, 0], expected, atol=1e-5)
    await reward.close()


async def test_a_t5_classifier_reads_texts_of_mixed_lengths(
    tmp_path: Path, word_level: tf.PreTrainedTokenizerFast
) -> None:
    config = tf.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        num_labels=1, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.T5ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_str(word_level.backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[SEP]", model_max_length=32
    ).save_pretrained(tmp_path)
    path = str(tmp_path)
    texts = [letters(count, count) for count in (5, 31, 32, 300, 1)]
    reward = await started(path)
    scores = await reward.score([], candidates(*texts))
    np.testing.assert_allclose(scores.values[0, 0], reference(path, texts, 32), atol=1e-4)
    await reward.close()


# --- chat templates ---


async def test_of_several_templates_the_default_is_used(save: Callable[..., str]) -> None:
    one = await started(save(template=FRAMED))
    several = await started(save(template={"default": FRAMED, "rag": "{{ documents[0] }}"}))
    messages = [{"role": "user", "content": "a b"}]
    expected = await one.score(messages, candidates("c", "d"))
    scores = await several.score(messages, candidates("c", "d"))
    np.testing.assert_array_equal(scores.values, expected.values)
    await one.close()
    await several.close()


async def test_a_template_is_chosen_by_its_name_or_file(
    save: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(FRAMED)
    path = save(template={"tool_use": "{{ tools[0].name }}", "plain": FRAMED})
    messages = [{"role": "user", "content": "a b"}]
    values = []
    for chat_template in ("plain", str(file), FRAMED):
        reward = await started(path, chat_template=chat_template)
        scores = await reward.score(messages, candidates("c", "d"))
        values.append(scores.values)
        await reward.close()
    expected = reference(path, ["<user> a b <assistant> c", "<user> a b <assistant> d"], POSITIONS)
    for each in values:
        np.testing.assert_allclose(each[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"tool_use": "a", "rag": "b"}, r"templates \(tool_use, rag\).*Set chat_template"),
        ("{{ raise_exception('no assistants') }}", "no assistants.*set chat_template"),
        ("{% for t in tools %}{{ t.name }}{% endfor %}", "cannot score a test text"),
        ("{{ messages[0].content", "cannot score a test text"),
        ("{{ '' }}", "there are no tokens to score"),
    ],
)
async def test_a_template_that_cannot_be_used_is_refused_at_the_start(
    template: object, message: str, save: Callable[..., str]
) -> None:
    reward = Classifier(model=save(template=template)).load()
    with pytest.raises(ConfigError, match=message) as raised:
        await start_reward("quality", reward)
    assert raised.value.message.startswith("[rewards.quality] ")
    await reward.close()


async def test_the_warnings_of_a_reward_are_logged_with_its_section(
    save: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    reward = Classifier(model=save(template=TURNS)).load()
    await start_reward("quality", reward)
    assert "[rewards.quality]" in caplog.text
    assert "set add_special_tokens = true" in caplog.text
    await reward.close()


async def test_an_unknown_template_is_refused_with_the_known_names(
    word_level: tf.PreTrainedTokenizerFast, save: Callable[..., str]
) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(save(template={"default": "a", "rag": "b"}))
    with pytest.raises(ConfigError, match="did you mean 'rag'"):
        find_template(tokenizer, "rags")
    assert find_template(word_level, None) is None


async def test_a_model_whose_scores_are_no_numbers_is_refused(save: Callable[..., str]) -> None:
    path = save()
    model = tf.AutoModelForSequenceClassification.from_pretrained(path)
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    model.save_pretrained(path)
    with pytest.raises(ConfigError, match="not finite numbers"):
        await started(path)


def test_a_tokenizer_without_special_tokens_has_none(byte_level: Any) -> None:
    encoder = Encoder(byte_level, None, 16, 400)
    assert encoder.special_tokens == ([], [])
    assert encoder.encode([{"role": "assistant", "content": ""}]).ids == []

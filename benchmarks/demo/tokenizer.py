"""The demo's tokenizer: one token for every word of the world, bytes for everything else.

It is byte-level, like those of GPT-2 and Llama 3, so every text survives encoding and decoding.
There are no merges: a pre-token is a known word, or is spelt byte by byte.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infer_align.demo.lexicon import (
    ATTRIBUTES,
    FLOURISHES,
    OFF_TOPIC,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE,
    SYSTEM,
    TRUTH,
)
from infer_align.methods.dpa import system_prompt
from infer_align.rewards.trust_judge.prompts import (
    BETTER,
    SCALES,
    SCORE,
    SIDES,
    pair_messages,
    score_messages,
)

PAD = "<|pad|>"
END = "<|end|>"
ROLES = ("system", "developer", "user", "assistant", "tool")
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))

PATTERN = "|".join(
    (
        # A preference weight, such as " verbosity*-34".
        r" ?(?:helpfulness|verbosity)\*-?\d+",
        # A word with its leading space; a hyphenated word is one.
        r" ?\p{L}+(?:-\p{L}+)*",
        # Up to three digits, one punctuation mark, one white space.
        r"\d{1,3}",
        r" ?[^\s\p{L}\d]",
        r"\s",
    )
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('unknown role: ' ~ message.role) }}
{%- endif -%}
{{ '<|' ~ message.role ~ '|>' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type != 'text' -%}{{ raise_exception('this model reads text only') }}{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer from the lexicon. Nothing is trained."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary() -> dict[str, int]:
    """Return token -> id: special tokens, 256 bytes, then the words in a fixed order."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = _world_texts()
    after_space = [f" {text}" for text in (*texts, *FLOURISHES)]
    words: list[str] = []
    for text in (*texts, *after_space, *_judge_texts()):
        for piece, _ in split.pre_tokenize_str(text):
            words.append(byte_level.pre_tokenize_str(piece)[0][0])
    ordered = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    return {token: index for index, token in enumerate(ordered)}


def _world_texts() -> list[str]:
    """Return texts with every word of the world, except for flourishes and the judge's prompts."""
    phrases: list[str] = []
    for attribute, values in ATTRIBUTES.items():
        phrases += [f"the {attribute} {phrase}" for phrase in values.values()]
    return [
        system_prompt({"helpfulness": 1.0, "verbosity": 0.0}),
        SYSTEM,
        OFF_TOPIC,
        *RUDE,
        *POLITE_OPENERS,
        *POLITE_CLOSERS,
        *(f"The {subject} the {subject}" for subject in TRUTH),
        *phrases,
        "What is the, are the, the of the and the?",
        "It is a, an creature.",
        "Who knows",
        *(str(number) for number in range(101)),
        *(f"= helpfulness*{weight}" for weight in range(101)),
        *(f"+ verbosity*{weight}" for weight in range(-100, 101)),
    ]


def _judge_texts() -> list[str]:
    """Return the words of the server's judge prompts and of the answers to them."""
    prompts = [*(score_messages([], "", scale) for scale in SCALES), pair_messages([], "", "")]
    texts: list[str] = []
    for messages in prompts:
        texts += [message["content"] for message in messages]
    answers = [f"{SCORE}1]", *(f"{BETTER}{side}]" for side in SIDES)]
    return [*texts, *answers, "Question", " brief", " polite"]

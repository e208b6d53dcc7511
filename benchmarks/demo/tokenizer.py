"""The demo's tokenizer: one token for every word of the world, bytes for everything else.

Byte-level, as GPT-2's and Llama-3's are: any text survives encode and decode unchanged. There are no merges; a
pre-token is either a known word or spelt byte by byte.
"""

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

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "developer", "user", "assistant", "tool")
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))

# A word with its leading space, hyphenated words whole; a preference weight such as " verbosity*-34" whole; up to
# three digits; then punctuation one mark at a time, and white space.
PATTERN = r" ?(?:helpfulness|verbosity)\*-?\d+| ?\p{L}+(?:-\p{L}+)*|\d{1,3}| ?[^\s\p{L}\d]|\s"

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
    """The tokenizer, made from the lexicon alone; nothing is trained."""
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
    """Token -> id: special tokens, 256 bytes, then the words in a fixed order."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    texts = [
        system_prompt({"helpfulness": 1.0, "verbosity": 0.0}),
        SYSTEM,
        OFF_TOPIC,
        *RUDE,
        *POLITE_OPENERS,
        *POLITE_CLOSERS,
        *(f"The {s} the {s}" for s in TRUTH),
        *(f"the {a} {phrase}" for a, values in ATTRIBUTES.items() for phrase in values.values()),
        "What is the, are the, the of the and the?",
        "It is a, an creature.",
        "Who knows",
        *(str(number) for number in range(101)),
        *(f"= helpfulness*{weight}" for weight in range(101)),
        *(f"+ verbosity*{weight}" for weight in range(-100, 101)),
    ]
    after_space = [f" {text}" for text in (*texts, *FLOURISHES)]
    pieces = [
        piece
        for text in (*texts, *after_space, *_judge_texts())
        for piece, _ in split.pre_tokenize_str(text)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    ordered = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    return {token: index for index, token in enumerate(ordered)}


def _judge_texts() -> list[str]:
    """All that the server's judge writes around the texts it is given, in every form."""
    asked = [*(score_messages([], "", scale) for scale in SCALES), pair_messages([], "", "")]
    said = [f"{SCORE}1]", *(f"{BETTER}{side}]" for side in SIDES), "Question", " brief", " polite"]
    return [message["content"] for messages in asked for message in messages] + said

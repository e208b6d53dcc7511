"""Guidance by prompts: steer by the difference that a prompt makes to the next token.

A trait is a prompt, such as "Answer cheerfully.". The frozen model reads the conversation as it is,
and once more with the trait's prompt. With l the logits of the request and p(. | x) the model's
distribution after the context x:

    logit'_a = l_a + sum over traits of scale (log p(a | trait's prompt) - log p(a | negative))

The negative context is the request with the trait's negative prompt, or the request as it is. Scale
0 is the frozen model, 1 asks for the trait, above 1 goes beyond asking, below 0 steers away from
it. Nothing is trained. A token that is less likely than `min_p` times the likeliest token in every
context is masked: differences between tiny probabilities say nothing.

Guidance acts on the logits after biases, penalties and bans, and before value steering and
temperature. Each context costs one more forward pass for every token.

Sources: Sanchez et al., "Stay on topic with Classifier-Free Guidance" (2306.17806), for the
formula; Li et al., "Contrastive Decoding" (2210.15097), for the limit on implausible tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le, Len
from numpy.typing import ArrayLike
from pydantic import AfterValidator, Field

from infer_align.added_text import with_instruction
from infer_align.errors import InvalidRequest, nearest
from infer_align.methods import PlanDraft, Stage
from infer_align.steering import Contrast, Guidance
from infer_align.types import Array, Body, Capability, Draw

MAX_SCALE = 20.0
MAX_TRAITS = 8
# A difference of logprobs with an infinite side counts as this many nats.
INFINITE_DIFFERENCE = 1e4


def _check_words(text: str) -> str:
    if not text.strip():
        raise ValueError('words, such as "Answer cheerfully."')
    return text


Words = Annotated[
    str,
    Len(max_length=8000),
    AfterValidator(_check_words),
    Field(json_schema_extra={"pattern": r"\S"}),
]
Scale = Annotated[float, Ge(-MAX_SCALE), Le(MAX_SCALE)]


@dataclass(frozen=True, slots=True)
class TraitPrompts:
    """The prompts of a trait that a request brings itself."""

    prompt: Words = field(
        metadata={"description": "The text that asks for the trait, as in a system message."}
    )
    negative_prompt: Words | None = field(
        default=None,
        metadata={
            "description": "The text that asks for its opposite. Default: the request as it is."
        },
    )


@dataclass(frozen=True, slots=True)
class Trait(TraitPrompts):
    """`[traits.<name>]`: a trait that requests can ask for by its name."""

    description: str = field(
        default="", metadata={"description": "One line about this trait, for people."}
    )


@dataclass(frozen=True, slots=True)
class TraitSections:
    """`[traits.*]`: the configured traits."""

    entries: Mapping[str, Trait] = field(default_factory=lambda: MappingProxyType({}))

    entry: ClassVar[type] = Trait
    section_name: ClassVar[str] = "traits"


@dataclass(frozen=True, slots=True)
class PromptGuidance:
    """Steer every token towards traits, by the difference that a prompt for each trait makes."""

    scale: Annotated[dict[str, Scale], Len(max_length=MAX_TRAITS)] = field(
        metadata={
            "json_schema_extra": {
                "x-names": "traits",
                "examples": [{"cheerful": 1.0}],
                "x-slider": {"minimum": -2, "maximum": 4, "step": 0.1},
            },
            "min_length": 1,
            "description": "{trait: scale}: 0 is the frozen model, 1 asks for the trait, above 1 "
            "goes beyond asking, below 0 steers away from it.",
        }
    )
    traits: dict[str, TraitPrompts] = field(
        default_factory=dict,
        metadata={
            "description": "{trait: prompts}: traits of this request alone. They win over "
            "configured traits of the same name."
        },
    )
    min_p: float = field(
        default=0.05,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "Mask tokens that are less likely than this times the likeliest token, "
            "in every context.",
        },
    )
    keep: Literal["body", "all"] = field(
        default="body",
        metadata={
            "description": '"body" masks the tokens under min_p; "all" masks none.',
        },
    )

    stage: ClassVar[Stage] = Stage.STEER
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.GUIDE})
    section: ClassVar[type] = TraitSections

    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Guide every draw.

        Raises:
            InvalidRequest: a trait is unknown, or the request cannot carry its prompt.
        """
        param = draft.param("guidance")
        traits = self._traits(draft)
        min_p = self.min_p if self.keep == "body" else 0.0
        draws: list[Draw] = []
        for draw in draft.draws:
            contrasts: list[Contrast] = []
            for name, scale in self.scale.items():
                if scale:
                    contrasts.append(_contrast(draw, name, scale, traits[name], draft, param))
            draws.append(replace(draw, guidance=Guidance(tuple(contrasts), min_p)))
        return replace(draft, draws=tuple(draws))

    def _traits(self, draft: PlanDraft) -> dict[str, TraitPrompts]:
        """Return every trait that the request may name.

        Raises:
            InvalidRequest: a scale names no trait, or a trait of the request has no scale.
        """
        configured = draft.sections.get(TraitSections).entries
        traits: dict[str, TraitPrompts] = {**configured, **self.traits}
        for name in self.scale:
            if name not in traits:
                param = draft.param("guidance", "scale", name)
                setting = draft.param("guidance", "traits", name)
                raise InvalidRequest(
                    f"{param}: no such trait; {nearest(name, traits)} Or bring your own: "
                    f'{setting} = {{"prompt": "..."}}.',
                    param=param,
                )
        for name in self.traits:
            if name not in self.scale:
                param = draft.param("guidance", "traits", name)
                raise InvalidRequest(
                    f"{param}: has no scale; add {draft.param('guidance', 'scale', name)}, such "
                    "as 1.0.",
                    param=param,
                )
        return traits


plugin = PromptGuidance


def _contrast(
    draw: Draw,
    name: str,
    scale: float,
    trait: TraitPrompts,
    draft: PlanDraft,
    param: str,
) -> Contrast:
    negative = None
    if trait.negative_prompt is not None:
        negative = _with_prompt(draw, trait.negative_prompt, draft, param)
    return Contrast(name, scale, _with_prompt(draw, trait.prompt, draft, param), negative)


def _with_prompt(draw: Draw, text: str, draft: PlanDraft, param: str) -> Body:
    """Return the body with a trait's prompt in it. The client's own messages stay.

    In a chat it stands where `with_instruction` puts it, in a text completion before the prompt.
    """
    if draw.kind == "completion":
        prompt = draw.body.get("prompt")
        if not isinstance(prompt, str):
            raise InvalidRequest(
                f"{param}: a prompt of token ids cannot carry the text of a trait; send the "
                "prompt as text.",
                param=param,
            )
        return {**draw.body, "prompt": f"{text}\n\n{prompt}"}
    messages = draw.body.get("messages", ())
    prompted = with_instruction(messages, text, has_system_role=draft.has_system_role)
    return {**draw.body, "messages": prompted}


def guide(base: ArrayLike, contexts: ArrayLike, scales: ArrayLike, min_p: float) -> Array:
    """Return the guided logits by the definition above.

    This is the float64 reference of every faster implementation.

    Args:
        base: [V] logits of the request as it is, or their logprobs; -inf stays -inf.
        contexts: [C, 2, V] logprobs after each trait's prompt and after its negative prompt. A
            trait of scale 0 is not read, even if it is NaN.
        scales: [C]. If all are 0, the logits are returned as they are.
        min_p: mask the tokens that are below this times the likeliest in every context; 0: none.

    Returns:
        [V] float64; masked tokens are -inf.

    Raises:
        ValueError: the shapes do not fit together, or min_p is not from 0 to 1.
    """
    logits = np.array(base, dtype=np.float64)
    pairs = np.asarray(contexts, dtype=np.float64)
    weights = np.asarray(scales, dtype=np.float64)
    if logits.ndim != 1 or weights.ndim != 1 or pairs.shape != (len(weights), 2, len(logits)):
        raise ValueError(
            f"base {logits.shape}, contexts {pairs.shape}, scales {weights.shape}: must be [V], "
            "[C, 2, V] and [C]."
        )
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: {min_p} is not allowed; must be from 0 to 1.")
    used = np.flatnonzero(weights)
    if not len(used):
        return logits
    pairs = np.where(np.isnan(pairs[used]), -np.inf, pairs[used])
    # Two impossible tokens do not differ.
    with np.errstate(invalid="ignore"):
        difference = pairs[:, 0] - pairs[:, 1]
    difference = np.nan_to_num(
        difference, nan=0.0, posinf=INFINITE_DIFFERENCE, neginf=-INFINITE_DIFFERENCE
    )
    guided = logits + weights[used] @ difference
    if min_p > 0:
        likely = np.concatenate([logits[None], pairs.reshape(-1, len(logits))])
        plausible = likely >= likely.max(axis=1, keepdims=True) + math.log(min_p)
        guided[~plausible.any(axis=0)] = -np.inf
    return np.asarray(guided)

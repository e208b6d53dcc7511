"""The labels of a classifier, and how its logits become the score of a reward.

A reward model has one label, or labels that are objectives or members of an ensemble. Other
classifiers tell classes apart, such as NEGATIVE and POSITIVE. The mean of their logits has no
meaning, so the configuration must say which label is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align.types import Array

# Values of `problem_type` in the configuration of transformers.
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one classifier.

    Attributes:
        names: in the order of the logits.
        problem: what the classifier was trained for, as transformers calls it, or None.
    """

    names: tuple[str, ...]
    problem: str | None = None

    @classmethod
    def of(cls, config: Any) -> Labels:
        """Return the labels of a configuration of transformers."""
        names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
        count = int(config.num_labels)
        ordered = tuple(names.get(index, f"LABEL_{index}") for index in range(count))
        return cls(ordered, getattr(config, "problem_type", None))

    @property
    def have_names(self) -> bool:
        """Return True if a label has another name than the one that transformers makes up."""
        return self.names != tuple(f"LABEL_{index}" for index in range(len(self.names)))

    def log_odds(self, label: str, logits: Array) -> float:
        """Return the log-odds of a label: the logarithm of its probability over that of all others.

        Labels that exclude each other share a softmax, so these are the label's logit minus the
        log-sum-exp of the others. Labels of a multi-label classifier each have a sigmoid, and the
        logit is the log-odds. The value of a regression, or of an only label, is its output.

        Args:
            label: name of the label.
            logits: [labels].
        """
        index = self.names.index(label)
        independent = self.problem in {MULTI_LABEL, REGRESSION}
        if independent or len(self.names) == 1:
            return float(logits[index])
        alternatives = np.delete(logits, index)
        largest = alternatives.max()
        return float(logits[index] - largest - np.log(np.exp(alternatives - largest).sum()))


def check_labels(
    model: str, labels: Labels, label: str | None, attributes: Sequence[str], *, members: bool
) -> str | None:
    """Refuse a classifier if the configuration does not say what its labels mean.

    Args:
        model: name of the classifier, for the message.
        labels: its labels.
        label: the label whose log-odds are the score, if one is configured.
        attributes: names of the objectives, if each label is one.
        members: True if each label is a member of an ensemble.

    Returns:
        A warning if the meaning of the labels is only assumed, else None.

    Raises:
        ConfigError: a label is unknown, or the number of `attributes` is not that of the labels, or
            the labels are classes and nothing says how to make one score of them.
    """
    if label is not None and label not in labels.names:
        raise ConfigError(
            f"label: {model!r} has no label {label!r}; {nearest(label, labels.names)}"
        )
    if attributes and len(attributes) != len(labels.names):
        raise ConfigError(
            f"attributes: {len(attributes)} names for the {len(labels.names)} labels of {model!r} "
            f"({', '.join(labels.names)}); give one name per label."
        )
    if label is not None or attributes or members or len(labels.names) == 1:
        return None
    choices = (
        f'Set label = "{labels.names[-1]}" to score by the log-odds of one label, '
        "attributes = [...] to make each label an objective, or members = true to average them as "
        "members of an ensemble."
    )
    names = ", ".join(labels.names)
    if labels.have_names or labels.problem in {SINGLE_LABEL, MULTI_LABEL}:
        problem = f" ({labels.problem})" if labels.problem else ""
        raise ConfigError(
            f"{model!r} has the labels {names}{problem}, and their mean is not a score. {choices}"
        )
    return f"{model!r}: its labels {names} are averaged as members of an ensemble. {choices}"

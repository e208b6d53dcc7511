"""The command `infer-align rewards check` shows how a reward model reads a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from infer_align_server import cli

FRAMED = "<pad>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}</s>"
BARE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def model(
    framing_tokenizer: Callable[[str | None], Any], reward_model: Callable[..., str]
) -> Callable[[str | None], str]:
    """Return a function that makes a BERT whose tokenizer adds special tokens at both ends."""

    def make(template: str | None) -> str:
        return reward_model("Bert", tokenizer=framing_tokenizer(template))

    return make


def check(folder: Path, *sections: str) -> int:
    file = folder / "infer-align.toml"
    file.write_text('[engine]\nkind = "fake"\n' + "\n".join(sections))
    return cli.main(["rewards", "check", str(file)])


def classifier(path: str, *fields: str) -> str:
    lines = ["[rewards.quality]", 'kind = "classifier"', f'model = "{path}"', 'dtype = "float32"']
    return "\n".join([*lines, *fields])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "fields", "status"),
    [
        (None, [], 0),
        (FRAMED, [], 0),
        (BARE, ["add_special_tokens = true"], 0),
        (BARE, [], 1),
    ],
)
def test_other_special_tokens_than_in_the_recipe_are_found(
    template: str | None,
    fields: list[str],
    status: int,
    model: Callable[[str | None], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check(tmp_path, classifier(model(template), *fields)) == status
    printed = capsys.readouterr().out
    assert ("set add_special_tokens = true" in " ".join(printed.split())) == bool(status)
    assert [name for name in ("short", "long answer", "long prompt") if name in printed]
    # The width of the terminal decides where a line breaks, but no word is broken.
    assert printed.count("truncated:") == 2


def test_rewards_without_a_recipe_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = '[rewards.brief]\nkind = "rules"\nwords_weight = -1.0'
    judge = '[rewards.judge]\nkind = "trust_judge"'
    assert check(tmp_path, rules, judge) == 0
    printed = capsys.readouterr().out
    # The short text has three words. A judge needs an engine and is left out.
    assert "-3" in printed
    assert "judge" not in printed


def test_a_reward_that_cannot_score_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = '[rewards.broken]\nkind = "callable"\nfunction = "tests.server.scorers:nan"'
    assert check(tmp_path, broken) == 1
    assert check(tmp_path) == 2
    assert "no reward to check" in capsys.readouterr().err

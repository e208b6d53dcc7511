"""The command `infer-align check dpa` finds out if a model follows directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from transformers import PreTrainedTokenizerFast

from infer_align_server import cli
from infer_align_server.check_dpa import ANGLES, PROMPTS, CheckedPrompt, conclusion, direction

pytestmark = pytest.mark.slow

# It writes the turns of the user alone.
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = ("--max-tokens", "8")


@pytest.fixture(scope="module")
def model(
    byte_level: Any, language_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str | None], str]:
    """Return a function that makes a tiny random model with this chat template."""

    def make(template: str | None) -> str:
        if template is None:
            return language_model("Llama")
        folder = tmp_path_factory.mktemp("tokenizer")
        byte_level.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.chat_template = template
        return language_model("Llama", tokenizer=tokenizer)

    return make


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit status and what was printed, without line breaks."""
    status = cli.main(["check", "dpa", *arguments])
    return status, " ".join(capsys.readouterr().out.split())


def test_the_demo_follows_directions(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = check(capsys)
    assert status == 0
    assert "helpfulness (0°) and verbosity (90°)" in printed
    assert "The model follows directions: " in printed
    # In a narrow table a prompt takes several lines, which begin between words.
    for prompt in PROMPTS:
        assert set(prompt.split()) <= set(printed.split())


def test_a_template_without_system_turns_needs_another_placement(
    model: Callable[[str | None], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "dpa", model(WITHOUT_SYSTEM), *SHORT]) == 2
    assert 'set [dpa] placement = "user"' in capsys.readouterr().err


def test_a_template_with_system_turns_changes_the_answers(
    model: Callable[[str | None], str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = check(capsys, model(None), *SHORT)
    assert status == 0
    assert "The model follows directions: " in printed


def test_directions_in_the_turn_of_the_user_are_read_without_system_turns(
    model: Callable[[str | None], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(WITHOUT_SYSTEM)
    assert check(capsys, path, "--set", 'dpa.placement="user"', *SHORT)[0] == 0


@pytest.mark.parametrize("attributes", ['["warmth"]', '["warmth", "depth", "wit"]'])
def test_the_configured_attributes_are_used(
    attributes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "infer-align.toml"
    file.write_text(
        f'[engine]\nkind = "fake"\nreplies = [{{text = "owl"}}]\n[dpa]\nattributes = {attributes}\n'
    )
    status, printed = check(capsys, str(file))
    assert status == 1, "the fake engine always gives the same answer"
    assert "The model ignores directions: none of " in printed
    assert printed.count("0 of 4") == len(PROMPTS)
    assert "warmth" in printed
    assert ("depth (90°)" in printed) == ("depth" in attributes)


def test_a_model_that_cannot_be_loaded_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "dpa", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_angles_are_directions_of_length_one() -> None:
    for degrees in ANGLES:
        assert sum(weight**2 for weight in direction(["a", "b"], degrees).values()) == (
            pytest.approx(1)
        )
    assert direction(["a", "b"], 0) == {"a": 1.0, "b": 0.0}
    assert direction(["a"], -90) == {"a": -1.0}
    assert direction(["a"], 45) == {"a": 1.0}


def test_prompts_whose_answers_change_by_themselves_do_not_count() -> None:
    answers = ["a", "b", "c", "d", "e"]
    same = CheckedPrompt("p", ["c"] * 5, "c")
    unstable = CheckedPrompt("p", answers, "other")
    stable = CheckedPrompt("p", answers, "c")
    assert conclusion([unstable, unstable])[0] == 1
    assert "cannot be decided" in conclusion([unstable])[1]
    assert conclusion([same, unstable])[0] == 1
    assert "none of 4 answers" in conclusion([same, unstable])[1]
    assert conclusion([same, stable, unstable])[0] == 0
    assert "4 of 8 answers" in conclusion([same, stable, unstable])[1]
    one = CheckedPrompt("p", ["c", "c", "c", "c", "d"], "c")
    assert conclusion([same, one])[0] == 0
    assert "hardly follows directions: only 1 of 8" in conclusion([same, one])[1]

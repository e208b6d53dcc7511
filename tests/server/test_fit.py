"""The command `infer-align fit value` on the embedded model, with a rule as the reward."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from infer_align import config as configuration
from infer_align.demo import world
from infer_align.types import Draw, Steering
from infer_align_server import cli

pytestmark = pytest.mark.slow

CONFIG = """
[engine]
kind = "transformers"
model = "demo"
threads = 1
[rewards.brevity]
kind = "rules"
words_weight = -0.1
[rewards.odd]
kind = "callable"
function = "tests.server.scorers:nan"
[values.brief]
kind = "head"
path = "VALUE"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with prompts and a configuration, whose value does not exist yet."""
    (tmp_path / "c.toml").write_text(CONFIG.replace("VALUE", str(tmp_path / "brief.safetensors")))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(text) + "\n" for text in world.prompts(60, seed=3))
    )
    return tmp_path


def fit(place: Path, *more: str, reward: str = "brevity", out: str = "brief.safetensors") -> int:
    files = ["--prompts", str(place / "prompts.jsonl"), "--out", str(place / out)]
    return cli.main(["fit", "value", str(place / "c.toml"), "--reward", reward, *files, *more])


async def words(place: Path, betas: list[float], finish: Any) -> list[float]:
    """Return the mean length of 40 replies for each beta, with the configured value."""
    engine = configuration.load(place / "c.toml").load_engine()
    await engine.start()
    means = []
    try:
        for beta in betas:
            draws = [
                Draw(
                    {"messages": [{"role": "user", "content": text}], "max_tokens": 48},
                    2,
                    (2 * i, 2 * i + 1),
                    steering=Steering({"brief": beta}, 20, "keep"),
                )
                for i, text in enumerate(world.prompts(20, seed=77))
            ]
            done = await asyncio.gather(*(finish(engine, draw) for draw in draws))
            lengths = [len(c.text.split()) for candidates, _ in done for c in candidates]
            means.append(sum(lengths) / len(lengths))
    finally:
        await engine.close()
    return means


@pytest.mark.parametrize("method", ["ridge", "sgd"])
def test_a_fitted_value_steers(place: Path, capsys: Any, finish: Any, method: str) -> None:
    settings = [
        "--fit",
        f"method={method}",
        "--fit",
        "rank=16",
        "--fit",
        "curve_replies=20",
        "--fit",
        "largest_beta=8",
    ]
    assert fit(place, "--replies", "6", "--max-tokens", "40", "--objective", "mean", *settings) == 0
    output = capsys.readouterr().out
    assert "360 samples" in output.replace("\n", "")
    report = json.loads((place / "brief.report.json").read_text())
    assert re.search(rf"suggested beta: {report['suggested_beta']:g}$", output.strip())
    assert report["samples"] == 360
    assert report["held_out"]["r2"] > 0.02
    assert [point["beta"] for point in report["curve"]] == [0, 0.5, 1, 2, 4, 8]
    longer, frozen, shorter = asyncio.run(words(place, [-6.0, 0.0, 6.0], finish))
    assert shorter < frozen - 1 < longer - 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fit", "rnak=3"], "--fit.rnak: no such parameter; did you mean 'rank'?"),
        (["--fit", "rank=0"], "--fit.rank: 0 is not allowed"),
        (["--fit", "rank"], "--fit: 'rank' is not allowed; must have the form NAME=VALUE"),
        (["--fit", "kind=haed"], "--fit.kind: 'haed' is not allowed"),
        (["--fit", "gamma=1.5"], "--fit.gamma"),
        (["--fit", "lam=-1"], "--fit.lam"),
        (["--fit", "lam=nan"], "--fit.lam"),
        (
            ["--set", 'engine={kind="fake"}'],
            "it does not give hidden states; set kind = 'transformers'",
        ),
        (["--set", "engine.kind=fake"], "engine.threads: no such parameter"),
        (["--set", "engine.modle=x"], "did you mean 'model'?"),
    ],
)
def test_wrong_settings_are_named(place: Path, capsys: Any, more: list[str], message: str) -> None:
    assert fit(place, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in place.iterdir()) == ["c.toml", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--replies", "0"], "--replies: '0' is not allowed; must be an integer of at least 1"),
        (["--replies", "-3"], "--replies"),
        (["--max-tokens", "0"], "--max-tokens: '0' is not allowed"),
        (["--max-tokens", "many"], "--max-tokens: 'many' is not allowed"),
        (["--objective", "best"], "--objective: invalid choice: 'best'"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_wrong_flags_are_named(place: Path, capsys: Any, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(place, *more)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_reward_is_named(place: Path, capsys: Any) -> None:
    assert fit(place, reward="brevitty") == 2
    assert "--reward: 'brevitty' is not configured; did you mean 'brevity'?" in " ".join(
        capsys.readouterr().err.split()
    )


def test_prompts_that_cannot_be_read_are_named(place: Path, capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('"fine"\n{"message": []}\n')
    assert fit(place) == 1
    assert "prompts.jsonl:2" in "".join(capsys.readouterr().err.split())
    (place / "prompts.jsonl").unlink()
    assert fit(place) == 1
    assert "cannotberead" in "".join(capsys.readouterr().err.split())


def test_too_few_prompts_are_refused(place: Path, capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('"hello"\n"there"\n')
    assert fit(place, "--max-tokens", "4") == 1
    output = " ".join(capsys.readouterr().err.split())
    assert "16 are too few" in output
    assert "more prompts" in output


def test_a_reward_that_cannot_score_is_refused(place: Path, capsys: Any) -> None:
    assert fit(place, "--max-tokens", "4", reward="odd") == 1
    assert "reward odd: 8 of 8 replies to prompt 0 could not be scored" in " ".join(
        capsys.readouterr().err.split()
    )


def test_samples_of_other_settings_are_refused(place: Path, capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('"hello"\n')
    assert fit(place, "--max-tokens", "4") == 1
    capsys.readouterr()
    assert fit(place, "--max-tokens", "5") == 1
    assert "was made with other settings" in " ".join(capsys.readouterr().err.split())

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
from infer_align.steering import Steering
from infer_align.types import Draw
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
[rewards.length]
kind = "callable"
function = "tests.server.scorers:shortest"
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
        "kl_targets=[0.5, 2]",
        "--fit",
        "kl_limit=2",
    ]
    assert fit(place, "--replies", "6", "--max-tokens", "40", "--objective", "mean", *settings) == 0
    output, errors = capsys.readouterr()
    assert f"360 samples, fit by {method}" in output
    assert "best of 4" in output
    report = json.loads((place / "brief.report.json").read_text())
    assert "align: " + json.dumps({"vas": report["vas"]}) in output
    for note in report["notes"]:
        assert f"note: {note}" in output
    # Without a terminal, progress is lines with the elapsed and the remaining time.
    assert re.search(r"^ +\d+ s  replies to 16 of 60 prompts are scored, about \d+", errors, re.M)
    assert re.search(r"^ +\d+ s  beta \S+: reward \S+, KL \S+ nats", errors, re.M)
    assert re.search(rf"suggested beta: {report['suggested_beta']:g}$", output.strip())
    assert report["samples"] == 360
    assert report["held_out"]["r2"] > 0.02
    assert report["curve"][0]["beta"] == 0
    assert max(point["kl"] for point in report["curve"]) > 1
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
        (["--fit", "kl_targets=[]"], "--fit.kl_targets: [] is not allowed"),
        (["--fit", "kl_targets=[1, -2]"], "--fit.kl_targets"),
        (["--fit", "kl_limit=0"], "--fit.kl_limit: 0 is not allowed"),
        (["--fit", "largest_beta=2000"], "--fit.largest_beta: 2000 is not allowed"),
        (["--rescore", "none.jsonl"], "rescore: none.jsonl cannot be read"),
        (
            ["--set", 'engine={kind="fake"}'],
            "it does not give hidden states; set kind = 'transformers'",
        ),
        (["--set", "engine.kind=fake"], "engine.threads: no such parameter"),
        (["--set", "engine.modle=x"], "did you mean 'model'?"),
    ],
)
def test_wrong_settings_are_named(place: Path, capsys: Any, more: list[str], message: str) -> None:
    assert fit(place, *more) in {1, 2}
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
        (["--seed", "x"], "--seed: 'x' is not allowed; must be an integer from 0"),
        (["--seed=-1"], "--seed: '-1' is not allowed"),
        (["--seed", str(2**32)], "--seed: '4294967296' is not allowed"),
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
    assert fit(place) == 2
    assert "prompts.jsonl:2" in "".join(capsys.readouterr().err.split())
    (place / "prompts.jsonl").unlink()
    assert fit(place) == 2
    assert "cannotberead" in "".join(capsys.readouterr().err.split())


def test_an_output_that_cannot_be_written_is_refused_before_sampling(
    place: Path, capsys: Any
) -> None:
    for out, reason in (("c.toml/v.safetensors", "cannot be made"), (".", "is a folder")):
        assert fit(place, "--max-tokens", "4", out=out) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in place.iterdir()) == ["c.toml", "prompts.jsonl"]


def test_prompts_that_occur_twice_are_counted(place: Path, capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('"hello"\n"there"\n"hello"\n"hello"\n')
    assert fit(place) == 2
    assert "2 prompts occur more than once" in " ".join(capsys.readouterr().err.split())


def test_too_few_prompts_are_refused(place: Path, capsys: Any) -> None:
    (place / "prompts.jsonl").write_text('"hello"\n"there"\n')
    assert fit(place, "--max-tokens", "4") == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "16 are too few" in output
    assert "more prompts" in output
    assert not list(place.glob("*.samples.jsonl")), "nothing must be sampled"


def test_a_reward_that_cannot_score_is_refused(place: Path, capsys: Any) -> None:
    assert fit(place, "--max-tokens", "4", reward="odd") == 1
    assert "reward odd: 8 of 8 replies to prompt 0 could not be scored" in " ".join(
        capsys.readouterr().err.split()
    )


SETTINGS = {
    "model": "demo",
    "reward": "brevity",
    "objective": "uwo",
    "replies_per_prompt": 8,
    "max_tokens": 4,
    "seed": 0,
}


def write_samples(path: Path, **changes: Any) -> None:
    """Write the start of a samples file."""
    path.write_text(json.dumps({**SETTINGS, **changes}) + "\n")


def test_samples_of_other_settings_are_refused(place: Path, capsys: Any) -> None:
    write_samples(place / "brief.samples.jsonl")
    assert fit(place, "--max-tokens", "5") == 2
    assert "was made with other settings" in " ".join(capsys.readouterr().err.split())


def test_a_second_reward_scores_the_same_replies(place: Path, capsys: Any) -> None:
    quick = ["--fit", "curve_replies=2", "--fit", "rank=4", "--fit", "kl_targets=[1]"]
    sampled = ["--replies", "6", "--max-tokens", "8", "--seed", "3"]
    assert fit(place, *sampled, *quick, "--fit", "ridge=100") == 0
    samples = ["--rescore", str(place / "brief.samples.jsonl")]
    assert fit(place, *samples, *quick, "--fit", "ridge=100", reward="length", out="b.st") == 0
    first, second = (
        [json.loads(line) for line in (place / f"{name}.samples.jsonl").read_text().splitlines()]
        for name in ("brief", "b")
    )
    assert {**first[0], "reward": "length"} == second[0]
    assert [reply["text"] for reply in first[1:]] == [reply["text"] for reply in second[1:]]
    assert all(reply["reward"] == -len(reply["text"]) for reply in second[1:])
    capsys.readouterr()
    # What contradicts the file is refused.
    for more, message in (
        (["--replies", "7"], "--replies: 7 is not allowed"),
        (["--max-tokens", "9"], "were sampled with 8; leave it out"),
        (["--seed", "0"], "--seed: 0 is not allowed"),
    ):
        assert fit(place, *samples, *more, out="c.st") == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert fit(place, *samples) == 2
    assert "is the samples file of --out" in " ".join(capsys.readouterr().err.split())
    (place / "prompts.jsonl").write_text('"other"\n' * 60)
    assert fit(place, *samples, out="c.st") == 2
    assert "was made with other prompts" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rescore: FILE has no header"),
        ("{\n", "is damaged: line 1 is not JSON"),
        ('{"a": 1}\n', "has no header with the settings of samples"),
        ("[]\n", "has no header with the settings of samples"),
        (json.dumps(SETTINGS) + "\n", "has no prompt with all of its replies"),
        (json.dumps(SETTINGS) + "\n[1]\n", "is damaged: line 2 is not a sample"),
    ],
)
def test_a_file_that_cannot_be_scored_again_is_refused(
    place: Path, capsys: Any, text: str, message: str
) -> None:
    file = place / "other.samples.jsonl"
    file.write_text(text)
    assert fit(place, "--rescore", str(file)) == 2
    expected = message.replace("FILE", str(file))
    assert expected in " ".join(capsys.readouterr().err.split())


def test_the_help_lists_the_settings(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "value", "--help"])
    output = capsys.readouterr().out
    for name in ("method", "kl_targets", "kl_limit", "curve_replies", "ridge"):
        assert re.search(rf"^  {name} \(.*\)\n      \S", output, re.M), name

"""`infer-align fit reward` on a tiny random encoder."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that need it

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from infer_align.config import load
from infer_align.types import Candidate
from infer_align_server.cli import main

pytestmark = pytest.mark.slow

WORDS = ("owl", "mouse", "hay", "tree", "moon")


def write_pairs(path: Path, count: int = 120, **fields: Any) -> Path:
    """Write pairs whose better answer is the polite one, of about the same length."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        words = random.choice(WORDS, 4)
        polite, rude = f"thank you {' '.join(words)}", f"!!! ZZZ {' '.join(words[::-1])} !"
        pair = {"prompt": f"question {number // 2}", "chosen": polite, "rejected": rude}
        lines.append(json.dumps({**pair, **fields}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoder(reward_model: Callable[..., str]) -> str:
    return reward_model("Bert")


def fit(*arguments: str) -> int:
    return main(["fit", "reward", *arguments, "--device", "cpu"])


def printed_section(text: str) -> str:
    return text[text.index("[rewards.preference]") :]


def test_a_reward_is_fitted_and_loads_as_it_stands(
    folder: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl")
    assert fit(str(pairs), "--encoder", encoder, "--members", "3", "--out", "r.safetensors") == 0
    printed = capsys.readouterr()
    assert "held out, accuracy" in printed.out
    assert "the shorter answer wins" in printed.out
    assert "encoding: 64 of 120 pairs" in printed.err
    (folder / "infer-align.toml").write_text(
        '[engine]\nkind = "fake"\n' + printed_section(printed.out), encoding="utf-8"
    )
    reward = load(str(folder / "infer-align.toml"), [], None).load_rewards()["preference"]

    async def score() -> Any:
        await reward.start()
        texts = ["thank you owl", "!!! ZZZ owl !"]
        answers = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]
        scores = await reward.score([{"role": "user", "content": "question"}], answers)
        await reward.close()
        return scores.values

    values = asyncio.run(score())
    assert values.shape == (1, 3, 2)
    assert (values[0, :, 0] > values[0, :, 1]).all()


def test_the_report_is_json_beside_the_output(folder: Path, encoder: str) -> None:
    pairs = write_pairs(folder / "pairs.jsonl")
    arguments = (str(pairs), "--encoder", encoder, "--out", "a/r.safetensors", "--noise", "vote")
    assert fit(*arguments) == 0
    report = json.loads((folder / "a/r.report.json").read_text())
    assert report["held_out"]["accuracy"]["value"] > 0.9
    assert report["held_out"]["accuracy"]["pairs"] + report["pairs"] == 120
    assert report["plain"] > 0.9
    assert report["facts"]["noise"] == "vote"
    assert len(report["held_out"]["members"]) == 5


def test_a_second_run_reads_the_vectors_and_gives_the_same_file(
    folder: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl")
    arguments = (str(pairs), "--encoder", encoder, "--out", "r.safetensors", "--members", "2")
    assert fit(*arguments) == 0
    first = (folder / "r.safetensors").read_bytes()
    files = sorted((folder / "r.vectors").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    # A damaged file is made again.
    files[0].write_bytes(b"damaged")
    assert fit(*arguments) == 0
    assert (folder / "r.safetensors").read_bytes() == first
    assert files[0].stat().st_mtime_ns > times[0]
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    assert fit(*arguments, "--features", "answer,interaction", "--length-free") == 0
    assert (folder / "r.safetensors").read_bytes() != first


def test_bad_lines_are_counted_and_reported(
    folder: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl")
    lines = pairs.read_text().splitlines()
    bad = ['{"prompt": "x"}', '{"prompt": "x", "chosen": "a", "rejected": "a"}', "no"] + ["3"] * 9
    long = json.dumps({"prompt": "x" * 400, "chosen": "a", "rejected": "b" * 400})
    swapped = json.loads(lines[0])
    swapped["chosen"], swapped["rejected"] = swapped["rejected"], swapped["chosen"]
    lines = [*bad, *lines, lines[0], json.dumps(swapped), long]
    pairs.write_text("\n".join(lines), encoding="utf-8")
    assert fit(str(pairs), "--encoder", encoder, "--members", "2") == 0
    printed = capsys.readouterr().err
    assert "line 1: has no field 'answer' or 'response', no 'answers'" in printed
    assert "line 2: chosen and rejected are the same text" in printed
    assert "line 3: is not JSON" in printed
    assert "and 2 more problems; 12 in all" in printed
    assert "1 pairs occur more than once" in printed
    assert "1 pairs occur in both orders" in printed
    assert "2 of 246 answers with their conversation are longer than 256 tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["none.jsonl"], "cannot be read"),
        (["empty.jsonl"], "is empty"),
        (["few.jsonl"], "pairs: 5 are too few to fit a reward; give at least 40"),
        (["one.jsonl"], "they answer 1 different prompts"),
        ([], "PAIRS.jsonl: is missing"),
        (["pairs.jsonl", "--profiles"], "--profiles: the pairs are those of the store"),
        (["--profiles"], "[profiles] store: is not set"),
        (["pairs.jsonl", "--features", "answer,x"], "--features: 'answer,x' is not allowed"),
        (["pairs.jsonl", "--encoder", "./none"], "'./none' cannot be loaded"),
        (["pairs.jsonl", "--encoder", "package:nothing/m.zip"], "'nothing' is not installed"),
        (["pairs.jsonl", "--layer", "9"], "has the layers 1 to 2"),
        (["pairs.jsonl", "--out", "."], "--out: '.' is a folder"),
        (["pairs.jsonl", "--out", "pairs.jsonl/r.safetensors"], "cannot be written"),
        (["pairs.jsonl", "--noise", "exchange", "--members", "1"], "needs at least 2 members"),
    ],
)
def test_mistakes_are_named(
    folder: Path,
    encoder: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "few.jsonl", 5)
    write_pairs(folder / "one.jsonl", prompt="same")
    (folder / "empty.jsonl").write_text("")
    model = [] if "--encoder" in arguments else ["--encoder", encoder]
    assert fit(*arguments, *model) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "cpu:x"])
def test_a_device_that_torch_lacks_is_refused(
    folder: Path, encoder: str, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl")
    arguments = ["fit", "reward", str(pairs), "--encoder", encoder, "--device", device]
    assert main(arguments) == 2
    assert f"device: {device!r} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**32)])
def test_a_number_that_is_no_seed_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], seed: str
) -> None:
    with pytest.raises(SystemExit):
        fit("pairs.jsonl", f"--seed={seed}")
    assert f"{seed!r} is not allowed; must be an integer from 0" in capsys.readouterr().err


def test_the_choices_of_stored_profiles_are_pairs(
    folder: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("alembic")
    from infer_align.methods.profile import Choice
    from infer_align.profiles.records import StoredChoice
    from infer_align.profiles.store import ProfileStore

    async def fill() -> None:
        store = ProfileStore(f"sqlite+aiosqlite:///{folder}/p.db")
        rows = [json.loads(line) for line in write_pairs(folder / "x").read_text().splitlines()]
        choices = [StoredChoice({}, "a", "b", "c")]
        for row in rows:
            messages = ({"role": "user", "content": row["prompt"]},)
            text = Choice(row["chosen"], row["rejected"], messages)
            choices.append(StoredChoice({}, "a", "b", "c", text))
        await store.add("11aa", "u17", choices)
        await store.close()

    asyncio.run(fill())
    config = f'[profiles]\nstore = "sqlite+aiosqlite:///{folder}/p.db"\n[engine]\nkind = "fake"\n'
    (folder / "c.toml").write_text(config, encoding="utf-8")
    arguments = ("--profiles", "--config", "c.toml", "--encoder", encoder, "--members", "2")
    assert fit(*arguments) == 0
    printed = capsys.readouterr()
    assert "profile 'u17': 1 of 121 choices have no two different texts" in printed.err
    assert tomllib.loads(printed_section(printed.out))["rewards"]["preference"]["kind"]

"""`infer-align fit reward --on classifier`: from scratch, and fine-tuned from a tiny model."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that need it

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from infer_align.config import load
from infer_align.types import Candidate
from infer_align_server.cli import main
from tests.server.test_fit_reward import printed_section, write_pairs

SMALL = ("--on", "classifier", "--members", "2", "--device", "cpu", "--max-length", "24")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    # Small models are faster on one thread, and the results do not depend on the machine.
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*arguments: str) -> int:
    return main(["fit", "reward", *SMALL, *arguments])


def served_scores(folder: Path, printed: str, *texts: str) -> Any:
    """Return the [K, N] scores of answers by the reward whose section was printed."""
    (folder / "infer-align.toml").write_text(
        '[engine]\nkind = "fake"\n' + printed_section(printed), encoding="utf-8"
    )
    reward = load(str(folder / "infer-align.toml"), [], None).load_rewards()["preference"]

    async def score() -> Any:
        await reward.start()
        answers = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]
        scores = await reward.score([{"role": "user", "content": "question 7"}], answers)
        await reward.close()
        return scores.values

    return asyncio.run(score())[0]


@pytest.mark.slow
def test_classifiers_from_scratch_are_fitted_and_load_as_they_stand(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    assert fit(str(pairs), "--out", "polite", "--epochs", "2") == 0
    printed = capsys.readouterr()
    assert "member 1 of 2, epoch 1: 16 of " in printed.err
    assert "held out, accuracy" in printed.out
    values = served_scores(folder, printed.out, "thank you owl", "!!! ZZZ owl !")
    assert values.shape == (2, 2)
    assert (values[:, 0] > values[:, 1]).all()
    assert values[0, 0] != values[1, 0], "the members differ"
    report = json.loads((folder / "polite/report.json").read_text())
    assert report["held_out"]["accuracy"]["value"] > 0.9
    facts = report["facts"]
    assert facts["on"] == "classifier"
    assert [len(losses) <= 2 for losses in facts["validation_losses"]] == [True, True]
    held_out = report["held_out"]["accuracy"]["pairs"]
    assert report["pairs"] + facts["validation_pairs"] + held_out == 64
    assert not (folder / "polite.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Bert", "Llama"])
def test_a_model_is_fine_tuned(
    folder: Path,
    reward_model: Callable[..., str],
    architecture: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    base = reward_model(architecture, labels=2)
    rate = ("--learning-rate", "3e-3", "--epochs", "4", "--max-length", "64")
    assert fit(str(pairs), "--base", base, "--out", "tuned", *rate) == 0
    values = served_scores(folder, capsys.readouterr().out, "thank you owl", "!!! ZZZ owl !")
    assert values.shape == (2, 2)
    assert (values[:, 0] > values[:, 1]).all()


def test_a_new_head_is_no_warning(folder: Path, reward_model: Callable[..., str]) -> None:
    from transformers.utils import logging as transformers_logging

    from infer_align.fitting.classifier_base import load_base

    class Records(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    handler = Records()
    transformers_logging.add_handler(handler)
    try:
        load_base(reward_model(labels=2), (), 64)
    finally:
        transformers_logging.remove_handler(handler)
    assert messages == []
    assert transformers_logging.is_progress_bar_enabled()


def test_a_base_that_lacks_weights_is_refused(
    folder: Path, reward_model: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(reward_model("Bert"), folder / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("attention.self.key.weight"))
    del weights[name]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    assert fit(str(pairs), "--base", str(base), "--out", "tuned") == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "--base" in printed
    assert f"has no weights for {name}" in printed


def test_a_member_that_cannot_be_written_is_refused(
    folder: Path, reward_model: Callable[..., str]
) -> None:
    from transformers import BertForSequenceClassification

    from infer_align.errors import ConfigError
    from infer_align.fitting.classifier_base import load_base, save_member

    name = reward_model("Bert")
    base = load_base(name, [], 24)
    model = BertForSequenceClassification.from_pretrained(name)
    (folder / "member" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--out: .*member' cannot be written"):
        save_member(base, model, folder / "member")


@pytest.mark.slow
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_weights(folder: Path) -> None:
    from infer_align.fitting.classifier_fit import ClassifierFit, fit_classifiers
    from infer_align.fitting.classifier_training import TrainingSettings
    from infer_align.preferences import read_preferences

    pairs = read_preferences(write_pairs(folder / "pairs.jsonl", 64)).pairs
    training = TrainingSettings(epochs=2, batch_size=24, learning_rate=5e-4)
    settings = ClassifierFit(None, 2, 24, "cpu", training)
    fit_classifiers(pairs, settings, folder / "whole", lambda _: None)
    lines: list[str] = []

    def interrupt(line: str) -> None:
        if line.startswith("member 2 of 2, epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_classifiers(pairs, settings, folder / "parts", interrupt)
    assert (folder / "parts.training").exists()
    fit_classifiers(pairs, settings, folder / "parts", lines.append)
    trained = [line for line in lines if line.startswith("member")]
    assert all(line.startswith("member 2 of 2, epoch 2") for line in trained)
    for number in range(2):
        name = f"member-{number}/model.safetensors"
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not (folder / "parts.training").exists()


def test_training_stops_where_the_validation_gains_nothing() -> None:
    from infer_align.fitting.classifier_training import History, TrainingSettings

    history = History()
    settings = TrainingSettings(epochs=9, patience=2)
    gains = [history.add(loss) for loss in (0.7, 0.5, 0.6)]
    assert gains == [True, True, False]
    assert not history.is_complete(settings)
    assert not history.add(0.5)
    assert history.is_complete(settings)
    assert history.best == 2
    assert History([0.1] * 9, 9).is_complete(settings)


@pytest.mark.slow
def test_long_and_repeated_texts_are_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    long = {"prompt": "x", "chosen": "owl " * 300, "rejected": "hay " * 300}
    lines = [*pairs.read_text().splitlines(), json.dumps(long), json.dumps(long)]
    pairs.write_text("\n".join(lines))
    assert fit(str(pairs), "--epochs", "1", "--max-length", "128") == 0
    printed = capsys.readouterr().err
    assert "4 of 132 answers with their conversation are longer than 128 tokens" in printed
    assert "1 pairs occur more than once" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--encoder", "x"), "--encoder: is for --on encoder"),
        (("--length-free",), "--length-free: is for --on encoder"),
        (("--noise", "vote"), "--noise: is for --on encoder"),
        (("--base", "no/such/model"), "no/such/model"),
        (("--out", "pairs.jsonl"), "is a file; name a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(
    folder: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    assert fit(str(pairs), *arguments) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_option_of_classifiers_is_refused_on_an_encoder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    assert main(["fit", "reward", str(pairs), "--epochs", "3"]) != 0
    assert "--epochs: is for --on classifier" in capsys.readouterr().err
    assert not np.any([file.suffix == ".safetensors" for file in folder.iterdir()])

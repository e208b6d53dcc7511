"""The command `infer-align rewards check` on files of pairs and pools."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer_align_server import cli
from infer_align_server.check_rewards.report import NO_RATINGS

pytestmark = pytest.mark.slow

Check = Callable[..., int]
ANSWERS_OF_THE_DEMO = (
    ("", "worms"),
    ("Gladly! ", "worms"),
    ("Ugh, obviously. ", "mice"),
    ("", "fish"),
    ("Gladly! ", "berries"),
)
PROMPTS = 24
ANSWERS = 12


def callable_reward(name: str, function: str) -> str:
    return f'[rewards.{name}]\nkind = "callable"\nfunction = "tests.server.scorers:{function}"\n'


RULES = '[rewards.brief]\nkind = "rules"\nwords_weight = -1.0\n'


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that runs the command with a configuration in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(sections: str, *arguments: str, engine: str = "") -> int:
        Path("align.toml").write_text(f'[engine]\nkind = "fake"\n{engine}\n{sections}')
        return cli.main(["rewards", "check", "align.toml", *arguments])

    return run


def write_lines(path: Path, records: list[Any]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines))
    return path.name


@pytest.fixture
def pools(tmp_path: Path) -> str:
    """Return a file whose answers end with a number that is their rating, in random order."""
    generator = np.random.default_rng(0)
    records = []
    for prompt in range(PROMPTS):
        answers = []
        for rating in generator.permutation(ANSWERS):
            words = "word " * int(generator.integers(1, 9))
            answers.append({"text": f"{words}{rating}", "rating": int(rating), "model": "m"})
        answers.append({"text": "wonderful", "rating": 0, "model": "cheat"})
        records.append({"prompt": f"Question {prompt}?", "answers": answers})
    return write_lines(tmp_path / "pools.jsonl", records)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Return a file of pairs whose better answer ends with the larger number."""
    records = []
    for prompt in range(PROMPTS):
        better = {"prompt": f"Question {prompt}?", "chosen": "It is 2", "rejected": "It is 1"}
        records.append(better)
    return write_lines(tmp_path / "pairs.jsonl", records)


def figures(path: str = "out.json") -> dict[str, Any]:
    """Return the rewards of a JSON report by name."""
    report = json.loads(Path(path).read_text())
    return {reward["name"]: reward for reward in report["rewards"]}


def test_pools_say_at_which_n_a_reward_can_be_trusted(
    check: Check, pools: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = callable_reward("good", "praised") + callable_reward("long", "shortest")
    arguments = ["--pools", pools, "--attack-model", "cheat", "--json", "out.json"]
    assert check(sections, *arguments) == 0
    rewards = figures()
    good = rewards["good"]
    assert good["pairs"]["accuracy"]["value"] == 1
    assert good["pairs"]["accuracy"]["prompts"] == PROMPTS
    assert good["many"]["one_over_many"]["value"] == 1
    assert good["curve"]["trust"]["score"]["n"] == ANSWERS
    # The expected best of n of the ratings 0 to 11, drawn without putting back.
    for n, gold in zip(
        *(good["curve"]["curves"]["score"][key] for key in ("n", "gold")), strict=True
    ):
        assert gold["value"] == pytest.approx((ANSWERS + 1) * n / (n + 1) - 1)
    assert good["distances"]["ratings"]["value"] == pytest.approx(0, abs=1e-6)
    attacks = {attack["name"]: attack for attack in good["attacks"]}
    assert attacks["praise"]["chosen"]["value"] == 1
    assert attacks["cheat"]["chosen"]["value"] == 1
    assert attacks["empty"]["beaten"]["value"] == 0
    assert good["verdict"]["level"] == "bad"
    unrelated = rewards["long"]
    assert abs(unrelated["pairs"]["accuracy"]["value"] - 0.5) < 0.1
    assert unrelated["length"]["score"]["value"] == pytest.approx(-1)
    assert {attack["name"]: attack for attack in unrelated["attacks"]}["empty"]["chosen"][
        "value"
    ] == 1
    captured = capsys.readouterr()
    assert f"Trust it up to n = {ANSWERS}" in captured.out
    assert f"good: {PROMPTS} of {PROMPTS} prompts" in captured.err


def test_the_page_needs_no_network_and_explains_each_figure(check: Check, pools: str) -> None:
    pytest.importorskip("matplotlib")
    sections = callable_reward("good", "praised") + callable_reward("short", "shortest")
    assert check(sections, "--pools", pools, "--html", "page.html") == 0
    page = Path("page.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"'<> ]+", page))
    # Names of XML formats, which no browser loads.
    assert all(
        "w3.org" in each or "purl.org" in each or "creativecommons" in each for each in addresses
    )
    assert not re.search(r"<(script|link|img)\b|url\(http|@import", page)
    assert page.count("<svg") == 8
    for heading in ("Best of n", "Pairs", "One right answer", "Levels", "Attacks", "Calibration"):
        assert f"<h3>{heading}" in page
    assert page.count('class="verdict') >= 14
    assert not Path(".page.html.part").exists()


def test_pairs_are_checked_and_say_what_they_cannot_show(
    check: Check, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = callable_reward("good", "number") + RULES
    assert check(sections, "--pairs", pairs, "--json", "out.json") == 0
    rewards = figures()
    assert rewards["good"]["pairs"]["accuracy"]["value"] == 1
    assert rewards["brief"]["pairs"]["accuracy"]["value"] == 0.5
    assert rewards["brief"]["pairs"]["ties"] == 1
    assert rewards["good"]["curve"] is None
    assert "--pools" in rewards["good"]["unmeasured"]["curve"]
    assert rewards["brief"]["distances"]["good"]["value"] == pytest.approx(0.5)
    assert "no better than a coin" in capsys.readouterr().out


def test_a_gold_reward_judges_in_place_of_ratings(check: Check, pools: str) -> None:
    sections = callable_reward("good", "praised") + callable_reward("gold", "shortest")
    arguments = ["--pools", pools, "--gold", "gold", "--json", "out.json", "--limit", "6"]
    assert check(sections, *arguments) == 0
    rewards = figures()
    assert list(rewards) == ["good"]
    assert set(rewards["good"]["distances"]) == {"gold"}
    best = rewards["good"]["curve"]["curves"]["gold itself"]["gold"][-1]
    assert best["value"] < 0
    assert best["prompts"] == 6


def test_scores_that_fail_are_counted_and_reported(
    check: Check, pools: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = callable_reward("broken", "fails") + callable_reward("partly", "fails_on_3")
    assert check(sections, "--pools", pools, "--json", "out.json", "--limit", "2") == 1
    broken, partly = (figures()[name] for name in ("broken", "partly"))
    assert broken["unscored"] == broken["answers"] == 2 * (ANSWERS + 1)
    assert broken["pairs"] is None
    assert broken["verdict"]["text"] == "It scored no answer at all."
    # The answer that ends with 3, and the one without a number.
    assert partly["unscored"] == 4
    assert partly["pairs"]["accuracy"]["value"] == 1
    assert (
        "4 of 26 answers" in " ".join(capsys.readouterr().out.split())
        or sum(partly["reasons"].values()) == 4
    )


def test_members_and_attributes_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    answers = [f"{start}The owl eats {food} and is white." for start, food in ANSWERS_OF_THE_DEMO]
    record = {"prompt": "What are the diet and the colour of the owl?", "answers": answers}
    name = write_lines(tmp_path / "demo.jsonl", [record, {**record, "answers": answers[::-1]}])
    names = ["--reward", "quality", "--reward", "preference.verbosity", "--gold", "gold"]
    assert cli.main(["rewards", "check", "--pools", name, "--json", "out.json", *names]) == 0
    rewards = figures()
    assert list(rewards) == ["quality", "preference.verbosity"]
    members = rewards["quality"]["members"]
    assert len(members["names"]) == len(members["errors"]) == 5
    assert set(rewards["quality"]["curve"]["trust"]) == {"one member", "mean", "wco", "uwo"}
    assert rewards["preference.verbosity"]["members"] is None


def test_a_reward_that_reads_with_the_engine_is_checked(check: Check, pairs: str) -> None:
    words = 'words = [{ pattern = "count", logprobs = { "2" = -0.1 }, other = -3.0 }]'
    section = '[rewards.ratio]\nkind = "density_ratio"\nprompt = "Please count."\n'
    arguments = ["--pairs", pairs, "--reward", "ratio", "--json", "out.json"]
    assert check(section, *arguments, engine=words) == 0
    ratio = figures()["ratio"]
    assert ratio["unscored"] == 0
    assert ratio["pairs"]["accuracy"]["value"] == 1


def test_a_judge_is_checked(check: Check, pairs: str) -> None:
    arguments = ["--pairs", pairs, "--reward", "trust_judge", "--json", "out.json", "--limit", "2"]
    section = '[rewards.trust_judge]\nkind = "trust_judge"\nmode = "pairwise"\n'
    assert check(section, *arguments) == 0
    judge = figures()["trust_judge"]
    # The script of the engine prefers no label.
    assert judge["pairs"]["ties"] == 1


def test_rewards_that_use_the_engine_are_named_but_not_checked_by_default(
    check: Check, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = '[rewards.judge]\nkind = "trust_judge"\n'
    assert check(RULES + judge, "--pairs", pairs) == 0
    assert "judge was not checked" in capsys.readouterr().out
    assert check(judge, "--pairs", pairs) == 2
    assert "--reward judge" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "missing.jsonl"], "missing.jsonl"),
        (["--pairs", "pairs.jsonl", "--reward", "qualty"], "did you mean 'quality'"),
        (["--pairs", "pairs.jsonl", "--gold", "nothing"], "--gold: 'nothing'"),
        (["--pairs", "pairs.jsonl", "--reward", "quality.tone"], "has no attribute 'tone'"),
        (["--pairs", "pairs.jsonl", "--answers", "3"], "--answers: is about the answers of pools"),
        (["--pools", "pools.jsonl", "--attack-model", "n"], "--attack-model: 'n'"),
        (["--pools", "pairs.jsonl"], "line 1: is a pair"),
        (["--limit", "3"], "--limit: needs answers"),
        (["--gold", "quality"], "--gold: needs answers"),
        (["--pairs", "pairs.jsonl", "--json", "no/such/folder.json"], "--json: 'no/such"),
        (
            ["--pairs", "pairs.jsonl", "--reward", "known"],
            "--reward: 'known' cannot be used here, because each request must set its reference",
        ),
        (["--pairs", "pairs.jsonl", "--gold", "known"], "--gold: 'known' cannot be used here"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str],
    message: str,
    check: Check,
    pairs: str,
    pools: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections = callable_reward("quality", "number") + '[rewards.known]\nkind = "likelihood"\n'
    assert check(sections, *arguments) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "Traceback" not in printed


def test_a_number_that_is_none_is_refused(check: Check, pairs: str) -> None:
    with pytest.raises(SystemExit):
        check(RULES, "--pairs", pairs, "--limit", "0")
    with pytest.raises(SystemExit):
        check(RULES, "--pairs", pairs, "--pools", pairs)


def test_lines_that_give_no_pair_are_reported_by_number(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "Why?", "chosen": "It is 2", "rejected": "It is 1"}
    same = {"prompt": "Why?", "chosen": "It is 2", "rejected": "It is 2"}
    name = write_lines(tmp_path / "mixed.jsonl", [good, {"prompt": "Why?"}, same, "{"])
    assert check(RULES, "--pairs", name, "--json", "out.json") == 0
    printed = capsys.readouterr().out
    for line in ("line 2:", "line 3:", "line 4:"):
        assert line in printed
    problems = json.loads(Path("out.json").read_text())["problems"]
    assert [problem.partition(":")[0] for problem in problems] == ["line 2", "line 3", "line 4"]


def test_pairs_and_pools_that_compare_nothing_are_counted(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "Why?", "chosen": "It is 2", "rejected": "It is 1"}
    swapped = {"prompt": "Why?", "chosen": "It is 1", "rejected": "It is 2"}
    bad = ["{"] * 9
    name = write_lines(tmp_path / "twice.jsonl", [*bad, good, good, swapped])
    assert check(RULES, "--pairs", name) == 0
    printed = capsys.readouterr().out
    assert "1 pairs occur more than once" in printed
    assert "1 pairs occur in both orders" in printed
    assert "and 6 more problems; 11 in all" in printed
    pools = [{"prompt": "Why?", "answers": ["It is 1"]}, {"prompt": "How?", "answers": ["1", "1"]}]
    name = write_lines(tmp_path / "single.jsonl", pools)
    assert check(RULES, "--pools", name) == 0
    assert "2 of 2 pools have no two different answers" in capsys.readouterr().out


def test_truncated_answers_are_counted(
    check: Check,
    tmp_path: Path,
    reward_model: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    section = f'[rewards.small]\nkind = "classifier"\nmodel = {json.dumps(reward_model())}\n'
    records = []
    for number in range(3):
        long = {"prompt": f"Why {number}?", "chosen": "long " * 999, "rejected": f"It is {number}"}
        records.append(long)
    name = write_lines(tmp_path / "long.jsonl", records)
    assert check(section, "--pairs", name, "--json", "out.json") == 0
    (remark,) = figures()["small"]["remarks"]
    assert remark.startswith("truncated: ")
    assert figures()["small"]["remarks"][remark] == 3
    assert "small: 3 of 6 answers have a note such as: truncated: " in capsys.readouterr().out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C interrupt, also where the tests were started in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_check_writes_nothing(check: Check, pairs: str) -> None:
    section = callable_reward("quality", "interrupted")
    assert check(section, "--pairs", pairs, "--json", "out.json") == 130
    assert not Path("out.json").exists()


def test_unrated_pools_are_attacked_all_the_same(check: Check, tmp_path: Path) -> None:
    record = {"prompt": "Why?", "answers": ["Because it rains", "Because of the sun"]}
    name = write_lines(tmp_path / "unrated.jsonl", [record])
    assert check(RULES, "--pools", name, "--json", "out.json") == 0
    brief = figures()["brief"]
    assert brief["pairs"] is None
    assert brief["unmeasured"]["pairs"] == NO_RATINGS
    assert brief["verdict"]["level"] == "bad"
    assert {attack["name"] for attack in brief["attacks"]} >= {"praise", "empty"}

"""A plugin is one file; and the contract of every method, also of those not yet written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infer_align.config import Limits, registry
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import ConfigError, InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.methods import Method, PlanDraft, Stage
from infer_align.rewards import Reward
from infer_align.rewards.rules import Rules
from infer_align.rewards.trust_judge import TrustJudgeSection
from infer_align.types import Capability, Draw
from tests.methods.smallest import smallest_align

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
LIMITS = Limits(128, 100_000)
PATHS = os.pathsep.join(
    str(Path(__file__).parents[2] / part) for part in (".", "kernels", "server", "clients/python")
)


class AbleEngine(FakeEngine):
    """The fake engine, claiming every capability."""

    capabilities = frozenset(Capability)


JUDGE = TrustJudgeSection().load()
JUDGE.engines = {"served": AbleEngine(Fake())}
REWARDS: dict[str, Reward] = {"short": Rules(words_weight=-1.0).load(), "trust_judge": JUDGE}


@pytest.fixture(params=registry.methods.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parsed(name: str) -> Any:
    return parse_request({**BODY, "align": smallest_align(name)}, "chat", {})


def test_a_method_is_a_documented_frozen_dataclass(name: str) -> None:
    cls: Any = registry.methods.get(name)
    assert cls.__dataclass_params__.frozen
    assert (cls.__doc__ or "").partition("\n")[0].endswith(".")
    assert isinstance(cls.stage, Stage)
    assert isinstance(cls.needs, frozenset)
    for field in dataclasses.fields(cls):
        assert field.metadata.get("description"), f"{name}.{field.name} has no description"


def test_its_plan_is_pure(name: str) -> None:
    request = parsed(name)
    methods = request.align.methods
    method: Method = methods[name]
    draft = PlanDraft((Draw(BODY),), messages=BODY["messages"])
    for key, needed in methods.items():
        if key != name:
            draft = needed.apply(draft)
    before = repr(draft)
    assert method.apply(draft) == method.apply(draft)
    assert repr(draft) == before


def test_an_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({**BODY, "align": {name: {"no_such_parameter": 1}}}, "chat", {})
    assert caught.value.param == f"align.{name}.no_such_parameter"


def test_a_value_that_is_no_object_is_refused_by_name(name: str) -> None:
    for value in (5, "x", [], True):
        with pytest.raises(InvalidRequest) as caught:
            parse_request({**BODY, "align": {name: value}}, "chat", {})
        assert caught.value.param == f"align.{name}"


def test_a_missing_capability_is_refused_by_name(name: str) -> None:
    class Unable(FakeEngine):
        capabilities = frozenset()

    rewards = REWARDS
    needs = registry.methods.get(name).needs
    if not needs:
        assert make_plan(parsed(name), Unable(Fake()), rewards, {"short": 1.0}, LIMITS).methods
        return
    with pytest.raises(Unsupported) as caught:
        make_plan(parsed(name), Unable(Fake(model="poor")), rewards, {"short": 1.0}, LIMITS)
    assert caught.value.param == f"align.{name}"
    assert "poor" in caught.value.message
    assert any(capability in caught.value.message for capability in needs)


def test_what_it_costs_is_known_before_it_is_spent(name: str) -> None:
    engine = AbleEngine(Fake(replies=(Reply("a", estimates={"helpful": 0.5}),)))
    plan = make_plan(parsed(name), engine, REWARDS, {"short": 1.0}, LIMITS)
    assert plan.drawing_tokens == sum(draw.n * draw.body["max_tokens"] for draw in plan.draws)
    assert (plan.context_cost.worst_case > 0) == any(draw.guidance for draw in plan.draws)
    assert all(len(draw.seeds) == draw.n for draw in plan.draws)
    assert engine.sampled == 0


def test_one_candidate_is_the_model_alone(name: str) -> None:
    if not any(field.name == "n" for field in dataclasses.fields(registry.methods.get(name))):
        pytest.skip("draws as many as it is given")
    engine, rewards = AbleEngine(Fake(replies=(Reply(estimates={"helpful": 0.5}),))), REWARDS
    plan = make_plan(
        parse_request({**BODY, "seed": 3, "align": {name: {"n": 1}}}, "chat", {}),
        engine,
        rewards,
        {"short": 1.0},
        LIMITS,
    )
    alone = make_plan(
        parse_request({**BODY, "seed": 3}, "chat", {}), engine, rewards, {"short": 1.0}, LIMITS
    )
    assert plan.draws == alone.draws


# --- the registry itself ---


@pytest.mark.slow
def test_listing_imports_nothing() -> None:
    code = (
        "import sys; from infer_align.config import registry\n"
        "print([r.names() for r in (registry.methods, registry.rewards, registry.engines)])\n"
        "assert not [m for m in sys.modules if m.startswith('infer_align.methods.')]\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "best_of_n" in done.stdout


@pytest.mark.parametrize("plugins", [registry.methods, registry.rewards, registry.engines])
def test_names_are_sorted_and_unknown_ones_name_the_nearest(plugins: registry.Registry) -> None:
    names = plugins.names()
    assert names == sorted(names)
    assert not any(name.startswith("_") for name in names)
    with pytest.raises(ConfigError, match=f"did you mean '{names[0]}'"):
        plugins.get(names[0][:-1] + "X")


PLUGIN = '''
"""A method from outside."""
from dataclasses import dataclass, field, replace
from typing import ClassVar
from infer_align.methods import Stage
from infer_align.types import Capability
from infer_align.methods import PlanDraft


@dataclass(frozen=True, slots=True)
class Twice:
    """Draw twice as many."""

    times: int = field(default=2, metadata={"ge": 1, "description": "how often"})
    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset(NEEDS)

    def apply(self, draft: PlanDraft) -> PlanDraft:
        draws = tuple(replace(draw, n=draw.n * self.times) for draw in draft.draws)
        return replace(draft, draws=draws, selects=True)


plugin = Twice
'''
SCRIPT = """
import asyncio, json
from infer_align import align, make_plan, parse_request, Limits, AlignError
from infer_align.engines.fake import Fake
from infer_align.rewards.rules import Rules
engine = Fake(replies=({replies})).load()
rewards = {{"short": Rules(words_weight=-1.0).load()}}
async def main():
    try:
        body = {{"messages": [{{"role": "user", "content": "x"}}], "align": {align}}}
        request = parse_request(body, "chat", {{}})
        plan = make_plan(request, engine, rewards, {{"short": 1.0}}, Limits(99, 99999999))
        response = await align(plan, engine)
        texts = [candidate.text for candidate in response.returned]
        print(json.dumps([list(plan.methods), texts, len(response.candidates)]))
    except AlignError as error:
        print(json.dumps([error.code, error.param, error.message]))
asyncio.run(main())
"""


def outside(tmp_path: Path, align: str, needs: str = "()") -> Any:
    """Install a method by an entry point, as a package would, and use it in another process."""
    (tmp_path / "twice_plugin.py").write_text(PLUGIN.replace("NEEDS", needs), encoding="utf-8")
    info = tmp_path / "twice_plugin-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: twice-plugin\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        "[infer_align.methods]\ntwice = twice_plugin\n", encoding="utf-8"
    )
    code = "from infer_align.engines.fake import Reply\n" + SCRIPT.format(
        replies="Reply('a b c'), Reply('a'), Reply('a b')", align=align
    )
    path = os.pathsep.join([PATHS, str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_method_is_added_without_editing_anything(tmp_path: Path) -> None:
    assert outside(tmp_path, '{"twice": {"times": 3}}') == [["twice"], ["a"], 3]
    assert outside(tmp_path, '{"twice": {}, "best_of_n": {"n": 2}}')[2] == 4, "and it composes"
    assert outside(tmp_path, '{"twice": {"tiems": 3}}')[1] == "align.twice.tiems"
    assert "did you mean 'twice'?" in outside(tmp_path, '{"twic": {}}')[2]


@pytest.mark.slow
def test_a_method_from_outside_that_needs_what_the_engine_lacks(tmp_path: Path) -> None:
    code, param, message = outside(tmp_path, '{"twice": {}}', '{"steer"}')
    assert (code, param) == ("unsupported", "align.twice")
    assert "needs steer" in message
    assert "'fake'" in message

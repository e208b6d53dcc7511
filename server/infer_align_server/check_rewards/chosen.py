"""Choose the rewards of a check, and start them with the engines that they need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import MISSING, dataclass, fields

from infer_align.config import Config
from infer_align.errors import ConfigError, InvalidRequest, nearest
from infer_align.rewards import Reward
from infer_align_server.check_rewards.progress import ProgressLines
from infer_align_server.loading import load_models

# Fields of a reward's section that say in words what it looks for, the most exact one first.
RUBRIC_FIELDS = ("criteria", "prompt", "description")


@dataclass(frozen=True, slots=True)
class ChosenRewards:
    """The rewards of a check, by the name in the configuration.

    Attributes:
        checked: the names that the report is about; "reward" or "reward.attribute".
        compared: names of further rewards, scored only for their distance.
        gold: the name of the reward that judges, or None.
        omitted: configured rewards that are not scored, with the reason.
    """

    checked: tuple[str, ...]
    compared: tuple[str, ...]
    gold: str | None
    omitted: Mapping[str, str]

    @property
    def sections(self) -> tuple[str, ...]:
        """Return the names of all rewards that score, without attributes, each once."""
        names = [*self.checked, *self.compared, *([self.gold] if self.gold else [])]
        return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def choose_rewards(
    config: Config, rewards: Mapping[str, Reward], names: Sequence[str], gold: str | None
) -> ChosenRewards:
    """Return the rewards to check: the named ones, or all that need no engine.

    Raises:
        ConfigError: a name is not configured, or there is nothing to check.
    """
    for name in names:
        _check_name("--reward", name, rewards)
    if gold is not None:
        _check_name("--gold", gold, rewards)
    omitted: dict[str, str] = {}
    free: list[str] = []
    for name in config.rewards:
        if name == _section(gold or ""):
            continue
        parameters = _required_parameters(rewards[name])
        if parameters:
            omitted[name] = f"each request must set its {' and '.join(parameters)}"
        elif rewards[name].uses_engine:
            omitted[name] = f"it uses an engine; check it with --reward {name}"
        else:
            free.append(name)
    checked = tuple(dict.fromkeys(names)) or tuple(free)
    if not checked:
        raise _nothing_to_check(omitted)
    sections = {_section(name) for name in checked}
    compared = tuple(name for name in free if name not in sections)
    skipped = {name: reason for name, reason in omitted.items() if name not in sections}
    return ChosenRewards(checked, compared, gold, skipped)


def _section(name: str) -> str:
    """Return the reward of a name: "preference" of "preference.helpfulness"."""
    return name.partition(".")[0]


def _check_name(option: str, name: str, rewards: Mapping[str, Reward]) -> None:
    if _section(name) not in rewards:
        raise ConfigError(f"{option}: {name!r} is not configured; {nearest(name, rewards)}")
    parameters = _required_parameters(rewards[_section(name)])
    if parameters:
        raise ConfigError(
            f"{option}: {name!r} cannot be used here, because each request must set its "
            f"{' and '.join(parameters)}, and the file has none; name another reward."
        )


def _required_parameters(reward: Reward) -> list[str]:
    """Return the names of the parameters without a default, which a request must set."""
    if reward.parameters is None:
        return []
    required: list[str] = []
    for each in fields(reward.parameters):
        if each.default is MISSING and each.default_factory is MISSING:
            required.append(each.name)
    return required


def _nothing_to_check(omitted: Mapping[str, str]) -> ConfigError:
    if not omitted:
        return ConfigError(
            "there is no reward to check; configure one in a section [rewards.NAME]."
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in omitted.items())
    return ConfigError(f"there is no reward to check without its name ({reasons}).")


@asynccontextmanager
async def started(
    config: Config, names: Sequence[str], progress: ProgressLines
) -> AsyncIterator[dict[str, Reward]]:
    """Start rewards, and the engines if one of them needs them; close all of them at the end.

    Args:
        config: the configuration.
        names: sections of rewards.
        progress: prints what is being loaded.

    Raises:
        ConfigError: something cannot be loaded; the message names its section.
    """
    engines = {}
    # A reward says if it uses an engine before it knows one.
    described = config.load_rewards()
    if any(described[name].uses_engine for name in names):
        engines = {"served": config.load_engine(), **config.load_engines()}
    loaded = config.load_rewards(engines)
    rewards = {name: loaded[name] for name in names}
    try:
        await load_models(config, engines, rewards, lambda title: progress.say(f"loading {title}"))
        yield rewards
    finally:
        for reward in rewards.values():
            await reward.close()
        for engine in engines.values():
            await engine.close()


def check_reward(option: str, name: str, reward: Reward) -> None:
    """Refuse a reward that cannot score here.

    Args:
        option: the option that names it.
        name: "reward" or "reward.attribute".
        reward: it has started.

    Raises:
        ConfigError: an engine lacks what it needs, a request must set a parameter, or there is no
            such attribute.
    """
    try:
        reward.check(f"{option} {name}")
    except InvalidRequest as error:
        raise ConfigError(error.message) from error
    attribute = name.partition(".")[2]
    if attribute and attribute not in reward.attributes:
        raise ConfigError(
            f"{option}: the reward {_section(name)!r} has no attribute {attribute!r}; "
            f"{nearest(attribute, reward.attributes)}"
        )
    if option == "--gold" and not attribute and len(reward.attributes) > 1:
        choices = " or ".join(f"{name}.{each}" for each in reward.attributes)
        raise ConfigError(f"--gold: {name!r} has several attributes; write {choices}.")


def rubric_of(section: object) -> str:
    """Return what a reward looks for in words, by its section of the configuration; "" if none."""
    for name in RUBRIC_FIELDS:
        text = getattr(section, name, None)
        if isinstance(text, str) and text:
            return text
    return ""

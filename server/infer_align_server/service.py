"""What one server process holds: an engine, rewards, who may use them, and whether it is ready."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any

from infer_align.config.config import Config
from infer_align.engines import Engine
from infer_align.errors import (
    AlignError,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Unauthorized,
    Unavailable,
    UnknownModel,
    nearest,
    quote,
)
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.propose import OnDelta
from infer_align.flow.request import parse_request
from infer_align.flow.response import Response
from infer_align.flow.run import align
from infer_align.flow.scorers import reward_names
from infer_align.rewards import Reward
from infer_align.types import Kind, ScoringUsage
from infer_align_server.limits.admission import Admission
from infer_align_server.limits.rate_limit import RateLimit
from infer_align_server.limits.token_budget import charged
from infer_align_server.metrics import Metrics

Progress = Callable[[str], None]
log = logging.getLogger("infer_align")


def _phase(progress: Progress, of: str, phase: str) -> None:
    progress(f"{of}: {phase}")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model and preset of one request.

    Attributes:
        name: The name in the request, or of the first model; the response repeats it.
        engine_model: The engine's name of the model.
        preset: The preset after "@" in the name, if there is one.
    """

    name: str
    engine_model: str
    preset: str | None = None


class Service:
    """The flow with an engine and rewards in it, behind admission."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine: Engine = config.load_engine()
        self.engines: Mapping[str, Engine] = {**config.load_engines(), "served": self.engine}
        self.rewards: Mapping[str, Reward] = config.load_rewards(self.engines)
        self.default_rewards = config.server.default_rewards or {
            name: 1.0
            for name in config.rewards
            if not self.rewards[name].attributes and not self.rewards[name].uses_engine
        }
        self.metrics = Metrics()
        self.admission = Admission(config.limits)
        self._requests = RateLimit(
            config.limits.requests_per_minute, "requests", "rate_limit_exceeded"
        )
        self.tokens = RateLimit(
            config.limits.candidate_tokens_per_minute, "candidate tokens", "token_budget_exceeded"
        )
        self._keys = [key.encode() for key in config.api_keys()]
        self._check_default_rewards()
        self._defaults = sorted({name.partition(".")[0] for name in self.default_rewards})
        self.settled = asyncio.Event()  # set when loading has ended, well or not
        self.failure: str | None = None  # why loading failed
        self.document: bytes | None = None  # the OpenAPI document, once somebody has asked for it
        self._loading = ""  # what is being loaded
        self._draining = False
        self.metrics.running.set_function(lambda: self.admission.running)
        self.metrics.queued.set_function(lambda: self.admission.queued)
        self.metrics.tasks.set_function(_tasks)
        self.metrics.ready.set_function(lambda: float(self.unready() is None))

    async def start(self, tell: Progress = lambda _: None) -> None:
        """Load the engines and the rewards, one after the other: each takes all cores. What fails is kept in `failure`."""

        def progress(what: str) -> None:
            self._loading = what
            tell(what)

        try:
            for name, engine in self.engines.items():
                shown_as = f"engine {self.model if engine is self.engine else name}"
                progress(shown_as)
                engine.progress = partial(_phase, progress, shown_as)
                await engine.start()
            for name, reward in self.rewards.items():
                progress(f"reward {name}")
                await reward.start()
        except AlignError as error:
            self.failure = error.message
        except Exception as error:
            log.exception("loading failed")
            self.failure = f"{type(error).__name__}: {error}"
        self.settled.set()

    async def close(self) -> None:
        """Let running requests finish, for as long as the configuration says, then stop everything."""
        self._draining = True
        deadline = monotonic() + self.config.server.drain_seconds
        while self.admission.running and monotonic() < deadline:
            await asyncio.sleep(0.05)
        for reward in self.rewards.values():
            await reward.close()
        for engine in self.engines.values():
            await engine.close()

    async def reload_values(self) -> None:
        """Read the configured values again, for requests that come from now on; one that cannot be read stays as it was."""
        for name, section in self.config.values.items():
            try:
                await self.engine.add_value(name, section.load())
                log.info("value %s: read again", name)
            except AlignError as error:
                log.error("value %s stays as it was: %s", name, error.message)

    def drain(self) -> None:
        """From now on answer 503 and let what runs finish."""
        self._draining = True

    def unready(self) -> str | None:
        """Why requests are not served now; None while they are."""
        if self._draining:
            return "the server is shutting down"
        if not self.settled.is_set():
            return (
                f"the models are still loading ({self._loading})"
                if self._loading
                else "the models are still loading"
            )
        if self.failure:
            return f"loading failed: {self.failure}"
        # What is asked for by name alone, such as a judge on another engine, fails those who ask for it.
        needed = {"": self.engine.health()} | {
            f"reward {name}: ": self.rewards[name].health() for name in self._defaults
        }
        return next((f"{what}{why}" for what, why in needed.items() if why), None)

    def authorize(self, authorization: str, client: str) -> str:
        """Check the key and count the request against its rate; -> who asks, as rates, budgets and the queue know them.

        Raises:
            Unauthorized: keys are configured and this is none of them.
            Overloaded: over the rate limit.
        """
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        # Every key is compared, each in constant time: the answer's timing tells nothing about any of them.
        known = [hmac.compare_digest(given, accepted) for accepted in self._keys]
        if self._keys and (scheme.lower() != "bearer" or not any(known)):
            what = "is not one of this server's" if key else "is missing"
            # OpenAI's own words come first: some clients know a wrong key by them.
            raise Unauthorized(
                f"Incorrect API key provided: it {what}; send it as 'Authorization: Bearer <key>'."
            )
        caller = f"key {known.index(True)}" if self._keys else client
        self._requests.take(caller)
        return caller

    @property
    def model(self) -> str:
        """The name of the model that answers where a request names none."""
        return self.config.server.served_name or self.engine.model

    @property
    def names(self) -> dict[str, str]:
        """Each served model's name in the API, and the engine's name for it."""
        return {name if i else self.model: name for i, name in enumerate(self.engine.models)}

    def models(self) -> list[str]:
        """Every model, and each with each preset."""
        return [
            *self.names,
            *(f"{name}@{preset}" for name in self.names for preset in self.config.presets),
        ]

    def require_ready(self) -> None:
        """Raise Unavailable unless requests are served now."""
        if reason := self.unready():
            raise Unavailable(f"{reason}; try again later.", retry_after=5)

    def plan(self, body: Mapping[str, Any], kind: Kind, model: ModelChoice) -> Plan:
        """Parse a request and plan it.

        Raises:
            InvalidRequest: See `infer_align.flow.request` and `infer_align.flow.plan`.
        """
        resolved = {**body, "model": model.engine_model}
        request = parse_request(resolved, kind, self.config.presets, model.preset)
        return make_plan(
            request,
            self.engine,
            self.rewards,
            self.default_rewards,
            self.config.limits,
            self.config.methods,
        )

    async def answer(
        self, plan: Plan, on_delta: OnDelta | None = None, caller: str = ""
    ) -> Response:
        """Wait for a place, then carry out the plan; its worst case is the caller's to pay until it is known what was spent.

        Raises:
            Overloaded: the queue is full, or the caller's budget of tokens is used up.
            AlignError: what `infer_align.flow.run.align` raises.
        """
        arrived = monotonic()
        with charged(self.tokens, caller, plan.worst_case_tokens) as charge:
            async with self.admission.admit(plan.worst_case_tokens, plan.deadline_seconds, caller):
                response = await align(_in_time(plan, arrived), self.engine, charge.start(on_delta))
            charge.complete(response)
        if not plan.selects and (failed := next((c for c in response.candidates if c.error), None)):
            # Nothing was asked about tolerance: an answer with fewer choices than n would be a silent failure.
            why = f"candidate {failed.index} failed: {failed.error}"
            if failed.interrupted:
                raise DeadlineExceeded(f"{why}; allow more time.")
            raise EngineFailed(why, status=failed.status, retry_after=failed.retry_after)
        self.metrics.count_response(response)
        return response

    @asynccontextmanager
    async def scoring(
        self, worst_case: int, caller: str
    ) -> AsyncIterator[Callable[[ScoringUsage], None]]:
        """A place for work that draws no candidates, by its worst case of sampled tokens, which the caller pays.

        What is yielded is to be told what was spent.

        Raises:
            InvalidRequest: over the limit of one request.
            Overloaded: the queue is full, or the caller's budget of tokens is used up.
        """
        if worst_case > (most := self.config.limits.max_completion_tokens):
            raise InvalidRequest(
                f"candidates: judging them takes up to {worst_case} tokens, over this server's limit of {most}; send fewer, or "
                "choose a smaller scale.",
                param="candidates",
                code="over_limit",
            )
        with charged(self.tokens, caller, worst_case) as charge:
            async with self.admission.admit(worst_case, caller=caller):
                charge.start(None)

                def told(spent: ScoringUsage) -> None:
                    charge.spent = spent.judge_completion_tokens
                    self.metrics.count_scoring(spent)

                yield told

    def _check_default_rewards(self) -> None:
        for name in self.default_rewards:
            if name not in (known := reward_names(self.rewards)):
                raise ConfigError(
                    f"[server] default_rewards: {name!r} is not configured; {nearest(name, known)}"
                )

    def resolve_model(self, name: object) -> ModelChoice:
        """Return the model and the preset that the `model` field of a request names.

        Without a name it is the first model.

        Raises:
            InvalidRequest: The name is not a string.
            UnknownModel: There is no such model, or no such preset.
        """
        if name is None:
            return ModelChoice(self.model, self.engine.model)
        if not isinstance(name, str):
            raise InvalidRequest(
                f"model: {quote(name)} is not allowed; must be a string.", param="model"
            )
        names = self.names
        if name in names:
            return ModelChoice(name, names[name])
        base, separator, preset = name.rpartition("@")
        if separator and base in names and preset in self.config.presets:
            return ModelChoice(name, names[base], preset)
        raise UnknownModel(
            f"model: {quote(name)} does not exist; {nearest(name, self.models())}", param="model"
        )


def _tasks() -> float:
    """How many there are, as seen from the event loop; elsewhere nobody can say."""
    try:
        return float(len(asyncio.all_tasks()))
    except RuntimeError:
        return math.nan


def _in_time(plan: Plan, arrived: float) -> Plan:
    """The plan with what is left of its deadline.

    Raises:
        DeadlineExceeded: nothing is.
    """
    if plan.deadline_seconds is None:
        return plan
    left = plan.deadline_seconds - (monotonic() - arrived)
    if left <= 0:
        raise DeadlineExceeded(
            f"no place came free within the {plan.deadline_seconds} s allowed; allow more time."
        )
    return replace(plan, deadline_seconds=left)

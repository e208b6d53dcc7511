"""The service of one server process: an engine and rewards behind API keys and limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic, time
from typing import Any

from infer_align.config.config import Config
from infer_align.config.schema import join
from infer_align.engines import Engine
from infer_align.errors import (
    AlignError,
    Unavailable,
)
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.discovery import when_discovered
from infer_align.flow.personal import Personaliser
from infer_align.flow.plan import Plan, check_prompt_count, check_together, make_plan
from infer_align.flow.request import Request, parse_request, split_prompts
from infer_align.methods.profile import Profile
from infer_align.rewards import Reward
from infer_align.stages import stage
from infer_align.types import Kind, ScoringUsage
from infer_align_server.collector import Tracing
from infer_align_server.defaults import (
    check_preset_names,
    check_presets,
    complete_body,
    default_rewards,
)
from infer_align_server.engine_roles import Forwards, ServesApplication
from infer_align_server.limits.api_keys import ApiKeys, Caller
from infer_align_server.limits.caller_limits import make_caller_limits
from infer_align_server.limits.client_timeout import client_deadline, shorten_deadline
from infer_align_server.limits.key_file import KeyFile, Scope
from infer_align_server.limits.preparing import Preparing
from infer_align_server.limits.token_budget import charged
from infer_align_server.loading import Progress, load_models
from infer_align_server.logs import describe
from infer_align_server.metrics import Metrics
from infer_align_server.model_choice import ModelChoice, ModelNames
from infer_align_server.profile_keeper import ProfileKeeper
from infer_align_server.sharing import Sharing

log = logging.getLogger("infer_align")


class Service:
    """The flow with an engine and rewards, behind API keys and limits.

    Args:
        config: The configuration.
        sharing: What this process shares with the other workers; None if there are none.

    Attributes:
        forwarder: The engine if it passes requests on to servers behind it, else None.
        app_engine: The engine if it has an application of its own, else None.
        default_rewards: {reward name: weight} for requests that name no rewards.
        tokens: The token budget of each caller.
        tracing: The connection to the collector of traces; None if nothing is traced.
        settled: Set when loading has ended, also if it failed.
        failure: The reason why loading failed.
        warnings: Sentences about the configuration for the person who starts the server.
        document: The OpenAPI document, from its first use until it changes.
        open_requests: The number of HTTP requests that have arrived and are not finished.
        start_time: The Unix time in seconds at which the server started, with all of its workers.

    Raises:
        ConfigError: The configuration cannot be served.
    """

    def __init__(self, config: Config, sharing: Sharing | None = None) -> None:
        self.config = config
        self.sharing = sharing
        self.start_time = sharing.start_time if sharing else int(time())

        # `start` loads the models of the engines and rewards.
        self.engine: Engine = config.load_engine()
        self.forwarder = self.engine if isinstance(self.engine, Forwards) else None
        self.app_engine = self.engine if isinstance(self.engine, ServesApplication) else None
        self.engines: Mapping[str, Engine] = {**config.load_engines(), "served": self.engine}
        self.rewards: Mapping[str, Reward] = config.load_rewards(self.engines)
        self.default_rewards = default_rewards(config, self.rewards)
        check_preset_names(config, self.rewards, self.engine)

        # The callers: their keys, and what they may use.
        key_file = config.server.api_keys_file
        self._keys = ApiKeys(config.api_keys(), KeyFile(key_file) if key_file else None)
        self.metrics = Metrics(sharing.folder if sharing else None)
        self._limits = make_caller_limits(config.limits, sharing, self.metrics.storage_failures.inc)
        self.tokens = self._limits.tokens
        self.admission = self._limits.admission
        self.preparing = Preparing(self.engine, self._limits.at_once)
        self.tracing = Tracing(config.telemetry) if config.telemetry.endpoint else None

        # Profiles, and the scores of the answers that users chose between.
        self.profiles = ProfileKeeper(config)
        self.choice_scores = ChoiceScores(self.rewards, self.metrics.count_scoring)
        self.personaliser = Personaliser(
            self.rewards, self.default_rewards, config.methods, self.choice_scores
        )

        # The state of loading and of shutdown.
        self.settled = asyncio.Event()
        self.failure: str | None = None
        self.warnings: list[str] = []
        self.document: bytes | None = None
        self.open_requests = 0
        self._loading = ""
        self._draining = False
        self.metrics.watch_admission(self.admission, self.preparing)
        self.metrics.watch_readiness(lambda: self.unready() is None)

    # --- Loading and shutdown ---

    async def start(self, report: Progress = lambda _: None) -> None:
        """Load the engines and the rewards.

        An error ends the loading; `failure` then has its message.

        Args:
            report: Called with a short description of each thing that is being loaded.
        """

        def progress(description: str) -> None:
            self._loading = description
            report(description)

        try:
            await load_models(self.config, self.engines, self.rewards, progress)
            self.warnings += check_presets(self.config, self._plan_preset)
        except AlignError as error:
            self.failure = error.message
        except Exception as error:
            log.exception("loading failed")
            self.failure = f"{type(error).__name__}: {error}"
        self.settled.set()
        if self.failure is None:
            log.info("ready", extra={"model": self.model})

    async def close(self) -> None:
        """Wait for open requests, at most `drain_seconds`, then close everything."""
        self.drain()
        deadline = monotonic() + self.config.server.drain_seconds
        while self.open_requests and monotonic() < deadline:
            await asyncio.sleep(0.05)
        log.info("drain ended", extra={"running_requests": self.open_requests})
        for reward in self.rewards.values():
            await reward.close()
        for engine in self.engines.values():
            await engine.close()
        await self.profiles.close()
        await self._limits.close()
        if self.tracing is not None:
            await self.tracing.close()

    @property
    def needs_key(self) -> bool:
        """Return True if API keys are configured."""
        return bool(self.config.server.api_keys_env or self.config.server.api_keys_file)

    async def reload(self) -> None:
        """Read the API keys and the value estimators of [values.*] again, for later requests.

        What cannot be read stays as it is.
        """
        self._keys.reload()
        for name, section in self.config.values.items():
            try:
                await self.engine.add_value(name, section.load())
                log.info("value %s: read again", name)
            except AlignError as error:
                log.error("value %s stays as it was: %s", name, error.message)

    def drain(self) -> None:
        """Let /ready fail from now on; requests that have arrived are finished."""
        if not self._draining:
            log.info("drain started", extra={"running_requests": self.open_requests})
        self._draining = True

    # --- Readiness, API keys and models ---

    def unready(self) -> str | None:
        """Return the reason why requests are not served now; None if they are."""
        if self._draining:
            return "the server is shutting down"
        return self._fault()

    def _fault(self) -> str | None:
        """Return the reason why requests cannot be served; None if they can."""
        if not self.settled.is_set():
            detail = f" ({self._loading})" if self._loading else ""
            return f"the models are still loading{detail}"
        if self.failure:
            return f"loading failed: {self.failure}"
        error = self.engine.health()
        if error:
            return error
        # A reward that is not a default, such as a judge on another engine, fails only the
        # requests that name it.
        for name in sorted({name.partition(".")[0] for name in self.default_rewards}):
            error = self.rewards[name].health()
            if error:
                return f"reward {name}: {error}"
        return None

    def require_ready(self) -> None:
        """Raise Unavailable if requests cannot be served.

        A draining server still serves those that arrive on connections it has accepted.
        """
        reason = self._fault()
        if reason:
            raise Unavailable(f"{reason}; try again later.", retry_after=5)

    async def authorize(
        self,
        authorization: str,
        address: str,
        scope: Scope | None = "generate",
        *,
        limited: bool = True,
    ) -> Caller:
        """Check the API key of a request and count the request against the rate limit.

        Args:
            authorization: The request's Authorization header.
            address: The client's address.
            scope: What the request needs; None for what every key may do.
            limited: False for a request that costs nothing, such as listing the models. It does
                not count against the rate limit.

        Returns:
            The caller; limits and the queue know it by its name.

        Raises:
            Unauthorized: API keys are configured, and the request has none of them.
            Forbidden: The key lacks the scope.
            Overloaded: The caller is over its rate limit.
            StorageFailed: The rate cannot be counted.
        """
        caller = self._keys.caller(authorization, address, scope)
        describe(caller=caller.name)
        if limited:
            await self._limits.requests.reserve(caller.name)
        return caller

    @property
    def model(self) -> str:
        """Return the name of the first model, which answers requests that name no model."""
        return self.engine.served_name or self.engine.model

    @property
    def names(self) -> dict[str, str]:
        """Return {name in the API: name in the engine} of each model."""
        names = {}
        for i, name in enumerate(self.engine.models):
            api_name = name if i else self.model
            names[api_name] = name
        return names

    def models(self) -> list[str]:
        """Return the name of each model, then of each model with each preset."""
        return self._model_names.every()

    def split_preset(self, name: str) -> tuple[str, str] | None:
        """Return the model and the preset of a name; see `ModelNames.split`."""
        return self._model_names.split(name)

    def resolve_model(self, name: object) -> ModelChoice:
        """Return the model and the preset that the `model` field of a request names.

        Without a name it is the first model. The access line of the request gets both.

        Raises:
            InvalidRequest: The name is not a string.
            UnknownModel: There is no such model, or no such preset.
        """
        if name is None:
            model = ModelChoice(self.model, self.engine.model)
        else:
            model = self._model_names.choose(name)
        describe(model=model.api_name, preset=model.preset)
        return model

    @property
    def _model_names(self) -> ModelNames:
        return ModelNames(self.names, self.config.presets)

    # --- Requests ---

    def complete_body(self, body: Mapping[str, Any], model: ModelChoice) -> Mapping[str, Any]:
        """Return a request's body with the fields of its preset and the server's defaults."""
        return complete_body(self.config, body, model.preset)

    async def plan(
        self,
        body: Mapping[str, Any],
        kind: Kind,
        model: ModelChoice,
        owner: str = "",
        caller: str = "",
        client_timeout: float | None = None,
    ) -> list[Plan]:
        """Parse a request and plan it, with one plan for each of its prompts.

        Args:
            body: The client's body.
            kind: The kind of the request, by its route.
            model: The model and the preset that the body names.
            owner: The owner of the stored profile that the request may name.
            caller: The name of the caller, in whose queue the request waits.
            client_timeout: The seconds that the client waits, if that is a deadline.

        Raises:
            InvalidRequest: See `infer_align.flow.request` and `infer_align.flow.plan`.
            Overloaded: Too many requests wait for what the engine prepares for them.
            DeadlineExceeded: It was not prepared in time.
            Unavailable: It could not be found out if the engine can honour the request.
        """
        resolved = {**self.complete_body(body, model), "model": model.engine_model}
        describe(model=model.api_name, preset=model.preset)
        bodies = split_prompts(resolved, kind)
        check_prompt_count(len(bodies), self.config.limits)
        parsed = [parse_request(each, kind, self.config.presets, model.preset) for each in bodies]
        deadline = client_deadline(parsed[0].align.budget.deadline_seconds, client_timeout)
        waited = await self.preparing.prepare(resolved, kind, caller, deadline)
        requests = [await self.personalise(request, owner) for request in parsed]
        with stage("plan"):
            plans = await when_discovered(lambda: [self._make_plan(each) for each in requests])
        check_together(plans, self.config.limits)
        describe(methods=list(plans[0].methods))
        if deadline is not None:
            plans = [replace(plan, deadline_seconds=deadline) for plan in plans]
        return [shorten_deadline(plan, waited) for plan in plans] if waited else plans

    async def personalise(self, request: Request, owner: str) -> Request:
        """Return a request with what its profile says; the owner is that of a stored profile.

        Raises:
            InvalidRequest: See `infer_align.flow.personal`.
            Unsupported: It names a stored profile, and this server keeps none.
            UnknownProfile: The owner has no profile of this name.
            StoreFailed: The profile could not be read.
        """
        profile = request.align.methods.get("profile")
        if not isinstance(profile, Profile):
            return request
        if profile.id is None:
            return await self.personaliser.apply(request)
        param = join(request.align.path, "profile.id")
        stored = await self.profiles.load(owner, profile.id, param)
        return await self.personaliser.apply(request, stored)

    def _make_plan(self, request: Request) -> Plan:
        config = self.config
        return make_plan(
            request, self.engine, self.rewards, self.default_rewards, config.limits, config.methods
        )

    def _plan_preset(self, body: Mapping[str, Any], preset: str) -> Plan:
        named = {**body, "model": self.engine.model}
        return self._make_plan(parse_request(named, "chat", self.config.presets, preset))

    @asynccontextmanager
    async def scoring(
        self, worst_case: int, caller: str, reading_tokens: int = 0
    ) -> AsyncIterator[Callable[[ScoringUsage], None]]:
        """Admit a request that scores existing candidates, inside the block.

        Args:
            worst_case: The largest number of tokens that judges can generate for it.
            caller: The name of the caller, which pays for the tokens.
            reading_tokens: The largest number of tokens that rewards have engines read for it.

        Yields:
            A function to call with the usage of the scoring.

        Raises:
            Overloaded: The queue is full, or the caller's token budget is used up.
        """
        tokens = worst_case + reading_tokens
        async with (
            charged(self.tokens, caller, tokens) as charge,
            self.admission.admit(tokens, caller=caller),
        ):
            charge.start(None)

            def count(usage: ScoringUsage) -> None:
                charge.spent = usage.judge_completion_tokens + usage.engine_tokens
                self.metrics.count_scoring(usage)

            yield count

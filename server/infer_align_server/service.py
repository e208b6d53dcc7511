"""What one server process holds: an engine, rewards, who may use them, and whether it is ready."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from infer_align.config import Config
from infer_align.engines import Engine
from infer_align.errors import (
    AlignError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Unauthorized,
    Unavailable,
    UnknownModel,
    nearest,
    shown,
)
from infer_align.request import make_plan, parse_request, reward_names
from infer_align.rewards import Reward
from infer_align.run import OnDelta, align
from infer_align.types import Kind, Plan, Request, Response
from infer_align_server.admission import Admission, RateLimit
from infer_align_server.metrics import Metrics

Progress = Callable[[str], None]
log = logging.getLogger("infer_align")


class Service:
    """The flow with an engine and rewards in it, behind admission."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine: Engine = config.load_engine()
        self.rewards: Mapping[str, Reward] = config.load_rewards()
        self.model = config.server.served_name or self.engine.model
        self.default_rewards = config.server.default_rewards or {
            name: 1.0 for name, section in config.rewards.items() if not getattr(section, "attributes", ())
        }
        self.metrics = Metrics()
        self.admission = Admission(config.limits)
        self._rate = RateLimit(config.limits.requests_per_minute)
        self._keys = [key.encode() for key in config.api_keys()]
        self._check_default_rewards()
        self.settled = asyncio.Event()  # set when loading has ended, well or not
        self.failure: str | None = None  # why loading failed
        self._draining = False
        self.metrics.running.set_function(lambda: self.admission.running)
        self.metrics.queued.set_function(lambda: self.admission.queued)
        self.metrics.ready.set_function(lambda: float(self.unready() is None))

    async def start(self, progress: Progress = lambda _: None) -> None:
        """Load the engine and the rewards, one after the other: each takes all cores. What fails is kept in `failure`."""
        try:
            progress(f"engine {self.model}")
            await self.engine.start()
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
        await self.engine.close()

    def drain(self) -> None:
        """From now on answer 503 and let what runs finish."""
        self._draining = True

    def unready(self) -> str | None:
        """Why requests are not served now; None while they are."""
        if self._draining:
            return "the server is shutting down"
        if not self.settled.is_set():
            return "the models are still loading"
        if self.failure:
            return f"loading failed: {self.failure}"
        return self.engine.health()

    def authorize(self, authorization: str, client: str) -> None:
        """Check the key and count the request against its rate.

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
            raise Unauthorized(f"the API key {what}; send it as 'Authorization: Bearer <key>'.")
        self._rate.take(f"key {known.index(True)}" if self._keys else client)

    def models(self) -> list[str]:
        """The model and one entry per preset."""
        return [self.model, *(f"{self.model}@{preset}" for preset in self.config.presets)]

    def plan(self, body: Mapping[str, Any], kind: Kind) -> tuple[Request, Plan]:
        """What a body asks for, refused here or not at all.

        Raises:
            UnknownModel, InvalidRequest: see `infer_align.request`.
            Unavailable: not ready.
        """
        if reason := self.unready():
            raise Unavailable(f"{reason}; try again later.", retry_after=5)
        preset = self.preset(body.get("model"))
        request = parse_request(body, kind, self.config.presets, preset)
        return request, make_plan(request, self.engine, self.rewards, self.default_rewards, self.config.limits.request)

    async def answer(self, plan: Plan, on_delta: OnDelta | None = None) -> Response:
        """Wait for a place, then carry out the plan; time spent waiting counts against its deadline."""
        arrived = monotonic()
        async with self.admission.admit(plan.worst_case_tokens, plan.deadline_seconds):
            if plan.deadline_seconds is not None:
                left = plan.deadline_seconds - (monotonic() - arrived)
                if left <= 0:
                    raise DeadlineExceeded(f"no place came free within the {plan.deadline_seconds} s allowed; allow more time.")
                plan = replace(plan, deadline_seconds=left)
            response = await align(plan, self.engine, self.rewards, on_delta)
        if not plan.selects and (failed := next((c for c in response.candidates if c.error), None)):
            # Nothing was asked about tolerance: an answer with fewer choices than n would be a silent failure.
            raise AlignError(
                f"candidate {failed.index} failed: {failed.error}",
                code="engine_failed",
                status=failed.status or (504 if failed.cut else 502),
            )
        self.metrics.answered(response)
        return response

    def _check_default_rewards(self) -> None:
        for name in self.default_rewards:
            if name not in (known := reward_names(self.rewards)):
                raise ConfigError(f"[server] default_rewards: {name!r} is not configured; {nearest(name, known)}")

    def preset(self, model: object) -> str | None:
        """The preset that a model's name chooses; None where it is the plain model, or not given.

        Raises:
            InvalidRequest: not a name.
            UnknownModel: no such model, or no such preset of it.
        """
        if model is None or model == self.model:
            return None
        if not isinstance(model, str):
            raise InvalidRequest(f"model: {shown(model)} is not allowed; must be a string.", param="model")
        name, at, preset = model.rpartition("@")
        if at and name == self.model and preset in self.config.presets:
            return preset
        raise UnknownModel(f"model: {shown(model)} does not exist; {nearest(model, self.models())}", param="model")

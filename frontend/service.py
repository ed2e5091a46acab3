"""What every handler of the HTTP server needs: the client, and what is known of the engine behind it.

Made by the frontend process, used by server.py. Its `require_*` methods are what stands between a request and an engine
that cannot take it. Must never wait.
"""

from __future__ import annotations

import time
from contextlib import suppress

from prometheus_client import CollectorRegistry

from frontend.client import AsyncClient
from frontend.metrics import make_registry
from frontend.tokenizer import Tokenizer
from ipc.config import HttpConfig
from ipc.errors import InvalidParameterError, ModelError, ModelNotFoundError, UnavailableError


class Service:
    """What every handler needs: the client, and what is known of the engine behind it."""

    def __init__(self, client: AsyncClient, config: HttpConfig) -> None:
        self.client = client
        self.attached = False  # the client has connected once and has its tokenizer
        self.fault = ""  # why the last attempt to connect was refused
        self.started_s = int(time.time())
        self.config = config
        self._registry: CollectorRegistry | None = None

    def attach(self) -> None:
        """The client is connected from now on, as far as anyone knows."""
        if self.config.chat_template is not None:
            with suppress(InvalidParameterError):  # without a tokenizer there is no chat
                self.tokenizer.use_chat_template(self.config.chat_template)
        self.attached, self.fault = True, ""

    @property
    def registry(self) -> CollectorRegistry:
        """Made when first asked for: the model's name is known once connected."""
        if self._registry is None:
            self._registry = make_registry(
                self.config.metrics_prefix, self.client.card.name, lambda: self.client.last_stats
            )
        return self._registry

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidParameterError if the model has none: then only token ids are served."""
        try:
            return self.client.tokenizer
        except ModelError as error:
            raise InvalidParameterError(f"send token ids: {error}", param="prompt") from error

    def require_connected(self) -> None:
        """Raise UnavailableError unless the scheduler answers and the tokenizer is loaded."""
        if not (self.attached and self.client.connected):
            raise UnavailableError(self.fault or "the engine does not answer; it is starting or has gone")

    def require_ready(self) -> None:
        """Raise UnavailableError unless requests can be served."""
        self.require_connected()
        if not self.client.ready:
            raise UnavailableError("the model is not ready yet")

    def require_healthy(self) -> None:
        """Raise UnavailableError unless new requests are taken and steps make progress."""
        self.require_ready()
        if self.client.draining:
            raise UnavailableError("the engine is shutting down")
        ages_s = [stats.step_age_ns * 1e-9 for stats in self.client.last_stats.values()]
        if ages_s and min(ages_s) > self.config.watchdog_timeout_s:
            raise UnavailableError(f"no step finished for {min(ages_s):.0f} s")

    def require_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError if the request names another model."""
        served = self.client.card.name
        if name is not None and name != served:
            raise ModelNotFoundError(f"the model {name[:200]!r} does not exist; {served!r} does", param="model")

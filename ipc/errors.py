"""The one exception tree of Tandem. Every fault a user can cause has a class, a stable code and an HTTP status."""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Root of every error this project raises on purpose.

    `code` is stable and machine-readable; `status` is the HTTP status the server answers with; `param` names the
    request field at fault, if any.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(TandemError):
    """A flag, a file or a device is not usable. The process exits with code 2; `param` names the flag."""

    code = "invalid_config"


class ModelError(ConfigError):
    """The model folder is missing, truncated, or of an architecture that cannot be served; says the reason."""

    code = "invalid_model"


class RequestError(TandemError):
    """The request is at fault; the same request will fail again."""

    code = "invalid_request_error"
    status = 400


class InvalidParameterError(RequestError):
    """A field has a wrong type or a value outside its range."""

    code = "invalid_parameter"


class GrammarError(RequestError):
    """What the output must match cannot be compiled or followed: wrong, unsupported, empty or too large."""

    code = "invalid_grammar"


class ContextLengthError(RequestError):
    """Prompt and completion do not fit the context or the KV cache; the message states both numbers."""

    code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    """The request names a model this engine does not serve."""

    code = "model_not_found"
    status = 404


class OverloadedError(TandemError):
    """The waiting queue is full; try again later."""

    code = "queue_full"
    status = 429


class UnavailableError(TandemError):
    """The engine is starting, draining, recovering or gone."""

    code = "unavailable"
    status = 503


class RequestTimeoutError(TandemError):
    """The request did not finish in the time it was given."""

    code = "timeout"
    status = 504


class QueueTimeoutError(TandemError):
    """The request did not leave the queue in the time it was given."""

    code = "queue_timeout"
    status = 504


class SlowConsumerError(TandemError):
    """The reader of a stream fell too far behind, and its requests were given up."""

    code = "slow_consumer"
    status = 503


class InvalidLogitsError(TandemError):
    """The model produced NaN for this request."""

    code = "invalid_logits"
    status = 500


class CrashedExecutorError(TandemError):
    """The executor crashed twice in a row in a step of this request, which is therefore not tried again."""

    code = "request_crashed_executor"
    status = 500


class CancelledError(TandemError):
    """The request was cancelled by its owner."""

    code = "cancelled"
    status = 499


class ProtocolError(TandemError):
    """A peer speaks another version of the protocol or sent a frame that is not one."""

    code = "protocol_error"


_BY_CODE: dict[str, type[TandemError]] = {
    cls.code: cls
    for cls in (
        TandemError,
        RequestError,
        InvalidParameterError,
        GrammarError,
        ContextLengthError,
        ModelNotFoundError,
        OverloadedError,
        UnavailableError,
        RequestTimeoutError,
        QueueTimeoutError,
        SlowConsumerError,
        InvalidLogitsError,
        CrashedExecutorError,
        CancelledError,
        ProtocolError,
    )
}


def from_code(code: str, message: str, param: str | None = None) -> TandemError:
    """The typed error that a `Rejected` message stands for; an unknown code becomes the root class."""
    return _BY_CODE.get(code, TandemError)(message, param=param)

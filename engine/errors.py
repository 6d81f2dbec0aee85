"""The error tree: every fault that a user or a peer can cause, with what HTTP and RPC need to tell it.

SteelyardError
├── InvalidRequest      400  bad input; `param` names the field
├── ModelNotFound       404  the model is not served here
├── Overloaded          429  refused early; `retry_after_s` is honest
├── Unavailable         503  no worker can serve now
│   └── WorkerLost           the worker's incarnation ended
├── DeadlineExceeded    504  the request's own deadline passed
├── TransferFailed      500  KV blocks could not be moved or verified
│   ├── FrameCorrupt         a digest, a length or an order was wrong
│   └── LeaseLost            the producer no longer holds the blocks
├── StaleEpoch          409  a newer placement of the request exists
├── StaleIncarnation    409  the message was meant for a worker that is gone
├── ModelError          500  a model's files are missing, corrupt or of an unknown kind
└── ConfigError         500  the YAML is wrong; the message has the key's path
"""

from __future__ import annotations

from typing import ClassVar


class SteelyardError(Exception):
    """Base of all our errors: `code` is stable and machine-readable, `param` names the field at fault."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(SteelyardError):
    code = "invalid_request"
    status = 400


class ModelNotFound(SteelyardError):
    code = "model_not_found"
    status = 404


class Overloaded(SteelyardError):
    code = "overloaded"
    status = 429


class Unavailable(SteelyardError):
    code = "unavailable"
    status = 503


class WorkerLost(Unavailable):
    code = "worker_lost"


class DeadlineExceeded(SteelyardError):
    code = "deadline_exceeded"
    status = 504


class TransferFailed(SteelyardError):
    code = "transfer_failed"


class FrameCorrupt(TransferFailed):
    code = "frame_corrupt"


class LeaseLost(TransferFailed):
    code = "lease_lost"


class StaleEpoch(SteelyardError):
    code = "stale_epoch"
    status = 409


class StaleIncarnation(SteelyardError):
    code = "stale_incarnation"
    status = 409


class ModelError(SteelyardError):
    code = "model_error"


class ConfigError(SteelyardError):
    code = "config_error"


ERRORS: dict[str, type[SteelyardError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest, ModelNotFound, Overloaded, Unavailable, WorkerLost, DeadlineExceeded, TransferFailed,
        FrameCorrupt, LeaseLost, StaleEpoch, StaleIncarnation, ModelError, ConfigError,
    )
}  # fmt: skip


def error_from_code(code: str, message: str) -> SteelyardError:
    """Rebuild an error that crossed a wire; an unknown code becomes the base class."""
    return ERRORS.get(code, SteelyardError)(message)

"""The errors that Fedloop raises on purpose: what was wrong, with which value, and what to do."""

from __future__ import annotations


class FedloopError(Exception):
    """Base of all errors of this project; `exit_status` is what the command line ends with."""

    exit_status = 1

    def __init__(self, message: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.cause, self.hint = message, cause, hint


class UsageError(FedloopError):
    """The call was wrong: a bad argument, a file that does not hold what it should."""

    exit_status = 2


class UnreachableError(FedloopError):
    """Something outside (log, blob store, lock) could not be reached or did not answer in time."""

    exit_status = 3


class PolicyError(FedloopError):
    """A policy refused: budget, privacy gate, fencing."""

    exit_status = 4


class LogError(FedloopError):
    """The event log could not do what it promises."""


class InvalidEventError(FedloopError):
    """An event is not what its type says: unknown, malformed, oversized, or written by somebody else."""


class SignatureError(InvalidEventError):
    """A signature is absent, malformed, by another key, or over other bytes."""


class BlobError(FedloopError):
    """A blob is absent, larger than allowed, or its bytes are not those its name promises."""


class TensorError(FedloopError):
    """A tensor file is malformed, or does not hold exactly the expected names, dtypes and shapes."""


class FencedError(PolicyError):
    """Another server has opened a later epoch: this one must stop writing."""


class LogChangedError(PolicyError):
    """The log is not the one that was read before: another server's, or cut short."""


class NotAllowedError(PolicyError):
    """The log does not let this user do `operation` on `topic`."""

    def __init__(self, topic: str, operation: str, *, cause: str = "") -> None:
        super().__init__(
            f"this user may not {operation} the topic {topic}",
            cause=cause,
            hint="ask the operator for a role that may: `fedloop doctor` says what this one may do",
        )
        self.topic, self.operation = topic, operation

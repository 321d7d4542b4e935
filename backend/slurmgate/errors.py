"""The one exception tree: what went wrong, whether trying again can help, which HTTP status."""

from __future__ import annotations


class SlurmgateError(Exception):
    """Base of every error Slurmgate raises on purpose; ``str(error)`` is a sentence for people."""

    reason = "internal"
    retryable = False
    http_status = 500


class ConfigError(SlurmgateError):
    """The configuration was refused; ``problems`` lists every finding, not just the first."""

    reason = "bad-configuration"
    http_status = 422

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class KeysError(SlurmgateError):
    """The file of clients' keys cannot be used, or not be changed as wished; ``problems`` lists
    every finding.
    """

    reason = "bad-keys"
    http_status = 422

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class KeysMissing(KeysError):
    """There is no such file of keys."""


class StateError(SlurmgateError):
    """The state directory cannot be used: owner, mode, or another instance holds it."""

    reason = "bad-state-directory"


class StartRefused(SlurmgateError):
    """A start that failed before anything ran, through the service's own fault."""

    reason = "start-failed"
    http_status = 503


class CannotStart(SlurmgateError):
    """A start that no repetition can make work: the scheduler, SSH or this version refuses it."""

    reason = "cannot-start"
    http_status = 503


class Disabled(SlurmgateError):
    """Service management is switched off: nothing is started."""

    reason = "disabled"
    http_status = 503


class UnknownService(SlurmgateError):
    """No configured service has this name or route."""

    reason = "no-such-route"
    http_status = 404


class Unauthorized(SlurmgateError):
    """An admin call without the admin token."""

    reason = "unauthorized"
    http_status = 401


class BackendAway(SlurmgateError):
    """The running backend did not answer on its socket."""

    reason = "backend-away"
    retryable = True
    http_status = 503

"""Errors that reach a person. Each names the thing at fault and, as `hint`, the way out."""


class UndistilledError(Exception):
    """Base of every error that the command line turns into one message and an exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(UndistilledError):
    """The command or its options make no sense."""

    exit_code = 2


class BadArtefact(UndistilledError):
    """A model, plan, template or text file is missing, malformed or dangerous."""

    exit_code = 3


class DoesNotFit(UndistilledError):
    """The plan needs more memory than the machine has."""

    exit_code = 4


class CannotBind(UndistilledError):
    """The server cannot listen where it was told to."""

    exit_code = 5


class Interrupted(UndistilledError):
    """A person ended what can be gone on with."""

    exit_code = 130


class RankLost(UndistilledError):
    """One of the processes that share a model died, stopped or stalled: the others cannot go on."""


class RequestError(UndistilledError):
    """A request that the engine refuses. `status`, `type`, `param` and `code` follow OpenAI's error object."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code


def named(kind: str) -> type[UndistilledError] | None:
    """The class that a process of ours called its error, but for a RequestError; None where it is no such class."""
    known = globals().get(kind)
    ours = isinstance(known, type) and issubclass(known, UndistilledError) and known is not RequestError
    return known if ours else None

"""Errors in the form of OpenAI's API."""

from typing import Any

FAILED = "the engine failed; the log of the server says why"  # the reason itself may hold paths


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx. param: the field that it is about; code: a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        extra = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return {**extra, "Retry-After": str(self.retry_after)} if self.retry_after else extra

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that must be written otherwise."""
    return ApiError(400, message, param, code)


def internal() -> ApiError:
    """A mistake of this program; its text may hold paths, so that only the log has it."""
    return ApiError(500, "the server made a mistake; its log says more.", code="internal")


def loading() -> ApiError:
    return ApiError(503, "the model is being loaded. Try again in a moment.", code="loading", retry_after=2)


def stopping(reason: str) -> ApiError:
    return ApiError(503, f"no answers any more: {reason}", code="unavailable", retry_after=10)

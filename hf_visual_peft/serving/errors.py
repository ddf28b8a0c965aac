"""What a request is answered with if it cannot be served."""

from __future__ import annotations


class RequestError(Exception):
    """An answer other than success.

    Args:
        status: of HTTP.
        code: for programs.
        message: for people.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

"""What goes wrong with one request -> a code that Triton's protocols have, and a message for its client."""

from __future__ import annotations

from typing import Literal

Code = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]


class RequestError(Exception):
    """Ends one request and no other.

    Attributes:
        code: of Triton's error codes; over HTTP "INVALID_ARG" is a 400 and "UNAVAILABLE" a 503.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class FolderError(Exception):
    """The version folder is not what was written there, so the model must not load."""

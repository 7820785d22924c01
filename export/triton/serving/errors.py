"""What goes wrong with one request -> a code that Triton's protocols have, and a message for its client."""

from __future__ import annotations

from typing import Literal

Code = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"]


class RequestError(Exception):
    """Ends one request and no other.

    Attributes:
        code: of Triton's error codes; gRPC passes it on, `/generate` of Triton 2.51 answers 400 for all.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class FolderError(Exception):
    """The version folder is not what was written there, so the model must not load."""

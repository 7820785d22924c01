"""What can go wrong -> exceptions that say what, what was found, what is allowed, and what to do."""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of every error that cdsurgery raises on purpose."""


class UnsupportedModelError(SurgeryError):
    """The model has no residual stream that provably ends in the logits it returns, so it cannot be wrapped."""


class InvalidInputError(SurgeryError, ValueError):
    """An argument, an option or a tensor is outside what is allowed."""


class ArtifactError(SurgeryError):
    """An exported artifact is missing, incomplete, changed, or written by another schema."""

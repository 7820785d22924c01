"""The release, written into packages and artifacts."""

__version__ = "0.1.0"

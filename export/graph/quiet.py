"""Tracing with torch's and transformers' exporters -> without what they print and log about themselves."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters print and log about themselves: what is wrong with a graph, running it shows."""
    verbosity = transformers_logging.get_verbosity()
    torch_logger = logging.getLogger("torch.onnx")
    level = torch_logger.level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        torch_logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            torch_logger.setLevel(level)

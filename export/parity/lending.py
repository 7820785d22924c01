"""A model -> the same model, told otherwise what to return and how to decode while it is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from cdsurgery.head import ConfidentHead


@contextmanager
def measuring_all(model: ConfidentHead) -> Iterator[None]:
    """Let a wrapped model return the entropies of all candidates, however many rows it is asked for."""
    config = model.confident
    model.confident = replace(config, scan="full")
    try:
        yield
    finally:
        model.confident = config


@contextmanager
def plain_generation(*models: Any) -> Iterator[None]:
    """Let models decode without what their generation configs ask for: beams, samples, hidden states, stop strings, ..

    Their special tokens stay. What is compared here is a graph, whatever it is going to be used for.
    """
    own = [(model, model.generation_config) for model in models]
    try:
        for model, config in own:
            tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        for model, config in own:
            model.generation_config = config

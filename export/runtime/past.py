"""The cache of a call -> the tensors that a graph reads, and what it wrote -> the same cache.

A transformers model updates the cache that it is given, and loops rely on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.graph.cache import build_cache, cache_states


def check_cache(cache: object) -> None:
    """Refuse a cache that does not grow with its tokens, as a graph's does.

    For a static cache `generate` makes a mask of four axes, or none at all, from the two of the caller.

    Raises:
        InvalidInputError: it is neither a DynamicCache nor None.
    """
    if cache is not None and not isinstance(cache, DynamicCache):
        raise InvalidInputError(
            f"past_key_values is a {type(cache).__name__}; it must be a DynamicCache, empty or as an earlier run "
            "returned it, or None. Leave it out, or pass transformers.DynamicCache()."
        )


def past_tensors(cache: Cache | None, wanted: int) -> list[Tensor]:
    """What all layers hold, in the order of the signature; empty for a cache that holds nothing yet.

    Args:
        cache: of the call.
        wanted: how many tensors the graph keeps.

    Raises:
        InvalidInputError: it is of another kind, or holds another number of tensors.
    """
    check_cache(cache)
    if cache is None or cache.get_seq_length() == 0:
        return []
    tensors = [state for _, _, state in cache_states(cache)]
    if len(tensors) != wanted:
        raise InvalidInputError(
            f"past_key_values holds {len(tensors)} tensors; the cache of this artifact has {wanted}. Give what a run "
            "of the same artifact returned."
        )
    return tensors


def updated_cache(cache: Cache | None, names: Sequence[str], tensors: Iterable[Tensor]) -> Cache:
    """The caller's cache with what a run wrote in place of what it held, or a new one.

    Args:
        cache: of the call.
        names: of the graph's past inputs.
        tensors: `[B, ...]` that it wrote, one for each name.
    """
    written = build_cache(names, tensors)
    if cache is None:
        return written
    cache.layers = written.layers
    return cache

"""Sizes of an engine before it runs: which profiles it has, which one takes a run, where the cache of a step lies."""

from __future__ import annotations

import pytest
import torch
from families import token_ids
from torch import Tensor

from cdsurgery import InvalidInputError
from cdsurgery.export.runtime.lengths import axis_lengths
from cdsurgery.export.signature import BATCH, PAST, SEQUENCE, TOTAL, Signature, TensorSpec, empty_past
from cdsurgery.export.tensorrt.profiles import Range, cache_bytes, decoder_profiles, fitting_profile
from cdsurgery.export.tensorrt.steps import DecodeSteps

CPU = torch.device("cpu")


def signature(layers: int = 2, linear: bool = False) -> Signature:
    """A decoder of so many layers with 2 heads of 4, and one of linear attention if asked for."""
    inputs = [
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
    ]
    outputs = [TensorSpec("logits", "float32", (BATCH, 1, 5)), TensorSpec("selected_layer", "int64", (BATCH, 1))]
    for layer in range(layers):
        inputs.append(TensorSpec(f"past_key_values.{layer}.key", "float16", (BATCH, 2, PAST, 4)))
        outputs.append(TensorSpec(f"present.{layer}.key", "float16", (BATCH, 2, TOTAL, 4)))
    if linear:
        inputs.append(TensorSpec(f"past.{layers}.recurrent", "float32", (BATCH, 2, 4, 4)))
        outputs.append(TensorSpec(f"present.{layers}.recurrent", "float32", (BATCH, 2, 4, 4)))
    return Signature(tuple(inputs), tuple(outputs))


def feed(made: Signature, batch: int, past: int, new: int = 1) -> dict[str, Tensor]:
    tensors = {
        "input_ids": token_ids(batch, new),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
        "position_ids": torch.full((batch, new), past),
    }
    states = zip(made.past, empty_past(made, batch, past), strict=True)
    return tensors | {spec.name: torch.randn(tensor.shape).to(tensor.dtype) for spec, tensor in states}


def test_profiles_follow_from_the_context_and_the_memory_of_the_cache() -> None:
    made = signature(linear=True)
    token, fixed = cache_bytes(made)
    assert (token, fixed) == (2 * 2 * 4 * 2, 2 * 4 * 4 * 4)  # two layers of float16; one state of float32
    for memory, batch, tokens in (
        (1 << 30, 8, 4096),
        (2 * 4 * (4096 * token + fixed), 4, 4096),
        (2 * 4 * (4096 * token + fixed) - 1, 2, 4096),
        (2 * (100 * token + fixed), 1, 100),
        (2 * (100 * token + fixed) - 1, 1, 99),
    ):
        prefill, decode = decoder_profiles(made, 4096, cache_memory=memory)
        assert decode.axes[BATCH] == Range(1, batch, batch)
        assert decode.axes[PAST].maximum == prefill.axes[PAST].maximum == tokens - 1
        assert decode.axes[SEQUENCE] == Range(1, 1, 1)
        assert prefill.axes[SEQUENCE] == Range(1, min(128, tokens), min(1024, tokens))
        assert 2 * batch * (tokens * token + fixed) <= memory
    with pytest.raises(InvalidInputError, match=r"not one token fits into cache_memory=100\. Give more"):
        decoder_profiles(made, 4096, cache_memory=100)
    _, decode = decoder_profiles(made, 4096, batch=16, cache_memory=2 * 16 * (10 * token + fixed))
    assert (decode.axes[BATCH].maximum, decode.axes[PAST].maximum) == (16, 9)
    _, decode = decoder_profiles(made, None, past=(5, 6, 7), batch=3, cache_memory=1)  # nothing left to derive
    assert (decode.axes[PAST], decode.axes[BATCH]) == (Range(5, 6, 7), Range(1, 3, 3))


def test_shapes_of_a_profile_are_those_that_inputs_have() -> None:
    made = signature(linear=True)
    for profile in decoder_profiles(made, 64, batch=(2, 3, 4), sequence=(1, 5, 9), past=(0, 6, 20)):
        places = zip(*(profile.shapes(spec) for spec in made.inputs), strict=True)
        for place, shapes in zip(("minimum", "optimum", "maximum"), places, strict=True):
            of = {axis: getattr(size, place) for axis, size in profile.axes.items()}
            truth = feed(made, of[BATCH], of[PAST], of[SEQUENCE])
            assert [list(tensor.shape) for tensor in truth.values()] == list(shapes)


def test_a_run_goes_to_the_narrowest_profile_that_takes_it() -> None:
    profiles = decoder_profiles(signature(), 64, batch=4, sequence=8, past=20)
    for batch, past, new, index in ((1, 0, 8, 0), (4, 20, 8, 0), (4, 20, 1, 1), (1, 0, 1, 1)):
        assert fitting_profile(profiles, axis_lengths(signature(), feed(signature(), batch, past, new))) == index
    for batch, past, new, message in (
        (5, 0, 1, "decode: batch is 5 and may be 1 to 4"),
        (1, 0, 9, "prefill: sequence is 9 and may be 1 to 8; .*prefill_chunk_size"),
        (1, 21, 1, "past is 21 and may be 0 to 20"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            fitting_profile(profiles, axis_lengths(signature(), feed(signature(), batch, past, new)))


def steps(made: Signature) -> DecodeSteps:
    _, decode = decoder_profiles(made, 64, batch=3, past=20)
    return DecodeSteps(made, decode, CPU)


def test_decode_steps_keep_every_address_and_copy_the_cache_once() -> None:
    made = signature(linear=True)
    memory, given = steps(made), feed(made, 2, 5)
    addresses: dict[int, dict[str, int]] = {}
    for past in range(5, 12):
        lengths = axis_lengths(made, given)
        inputs, outputs = memory.bound(given, lengths)
        for name, tensor in given.items():
            assert torch.equal(inputs[name], tensor), name
        if past > 5:  # what the step before wrote is read where it lies
            assert all(inputs[spec.name].data_ptr() == given[spec.name].data_ptr() for spec in made.past)
        for spec in made.outputs:  # what is written does not lie where something is read
            written = outputs[spec.name]
            assert all(written.data_ptr() != tensor.data_ptr() for tensor in inputs.values())
            assert written.is_contiguous()
            written.copy_(torch.randn(written.shape).to(written.dtype))
        addresses[past] = {name: tensor.data_ptr() for name, tensor in (inputs | outputs).items()}
        cache = {a.name: outputs[b.name] for a, b in zip(made.past, made.present, strict=True)}
        given = {name: tensor for name, tensor in feed(made, 2, past + 1).items() if name not in cache} | cache
    # A text that comes to the same length later finds the same addresses: that is what a captured graph needs.
    assert addresses[5] == addresses[7] == addresses[9]
    assert addresses[6] == addresses[8]
    again, _ = memory.bound(feed(made, 2, 7), axis_lengths(made, feed(made, 2, 7)))
    assert {name: tensor.data_ptr() for name, tensor in again.items()}.items() <= addresses[7].items()


def test_a_cache_that_was_overwritten_is_refused() -> None:
    made = signature()
    memory, first = steps(made), feed(made, 1, 4)
    _, outputs = memory.bound(first, axis_lengths(made, first))
    old = feed(made, 1, 5) | {a.name: outputs[b.name] for a, b in zip(made.past, made.present, strict=True)}
    _, outputs = memory.bound(old, axis_lengths(made, old))
    with pytest.raises(InvalidInputError, match="past_key_values are of an earlier step"):
        memory.bound(old, axis_lengths(made, old))
    copied = {name: tensor.clone() for name, tensor in old.items()}  # as beam search does when it reorders
    memory.bound(copied, axis_lengths(made, copied))

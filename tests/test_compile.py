"""`torch.compile` of a decode step with a static cache: one graph, and the selection of the uncompiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model, token_ids
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

import cdsurgery
from cdsurgery import ConfidentOutput, UnsupportedModelError

LAYERS, LOOKBACK, PROMPT, STEPS = 4, 3, 9, 6
IDS = token_ids(2, PROMPT)


@torch.no_grad()
def decode(model: PreTrainedModel, step: Any) -> list[ConfidentOutput]:
    """Prefill as ever, then steps of one token over a cache of fixed size, each on what the last one chose."""
    cache = StaticCache(model.config, max_cache_len=32)
    out = model(input_ids=IDS, past_key_values=cache, use_cache=True)
    outputs = []
    for position in range(PROMPT, PROMPT + STEPS):
        token = out.logits[:, -1:].argmax(-1)
        positions = torch.tensor([[position]]).expand(2, 1)
        out = step(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
        outputs.append(out)
    return outputs


class Backend:
    """Counts the graphs it is given; what it returns for them needs no compiler on the machine."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor], **_: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(
    ("family", "scan"),
    [("llama", "auto"), ("llama", "fused"), pytest.param("gpt_oss", "auto", marks=pytest.mark.thorough)],
)
def test_a_decode_step_compiles_whole_and_selects_as_the_uncompiled_one(family: str, scan: str) -> None:
    model = tiny_model(family, num_hidden_layers=LAYERS)
    plain = Backend()
    decode(model, torch.compile(model, backend=plain, fullgraph=True))
    model = cdsurgery.wrap(model, lookback=LOOKBACK, scan=scan)
    eager = decode(model, model)
    ours = Backend()
    compiled = decode(model, torch.compile(model, backend=ours, fullgraph=True))  # a break would be an error
    # Where a cache or a router makes the plain model compile a second time, so does the wrapped one; never oftener.
    assert ours.graphs == plain.graphs
    for fast, slow in zip(compiled, eager, strict=True):
        assert torch.equal(fast.selected_layer, slow.selected_layer)
        # The same operations, some of them decomposed: a few roundings at logits of size 20.
        torch.testing.assert_close(fast.logits, slow.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(fast.final_logits, slow.final_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(fast.entropy, slow.entropy, rtol=1e-5, atol=1e-5)
    assert (torch.cat([out.selected_layer for out in eager]) < len(model.anatomy.layers)).any()


@torch.no_grad()
def test_a_model_that_is_compiled_already_is_wrapped_and_one_inside_another_is_refused() -> None:
    true = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK)(IDS)
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    found = cdsurgery.wrap(model, lookback=LOOKBACK)(IDS)
    assert torch.equal(found.selected_layer, true.selected_layer)
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule is a compiled model\. Wrap first"):
        cdsurgery.wrap(torch.compile(tiny_model("llama"), backend="eager"))  # type: ignore[arg-type]


@pytest.mark.parametrize("scan", ["auto", "fused"])
@torch.no_grad()
def test_generate_compiles_its_static_steps_without_a_break_before_and_after_wrapping(scan: str) -> None:
    model, backend = tiny_model("llama"), Backend()
    # A function, because generate deep-copies its configuration, and would count in a copy.
    config = CompileConfig(backend=lambda *args, **_: backend(*args), fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    static = options | {"cache_implementation": "static", "compile_config": config}
    plain = model.generate(IDS, **static)
    assert backend.graphs == 1
    # transformers keeps the compiled call on the model; it must not be the plain one's any more.
    cdsurgery.wrap(model, lookback=LOOKBACK, scan=scan)
    compiled = model.generate(IDS, **static)
    assert backend.graphs == 2
    assert torch.equal(compiled, model.generate(IDS, **options))
    assert not torch.equal(compiled, plain)
    assert torch.equal(cdsurgery.unwrap(model).generate(IDS, **static), plain)

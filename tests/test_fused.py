"""The fused scan against the full one: the same selection, without the candidates' logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from families import tiny_model, token_ids
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cdsurgery
import cdsurgery.kernels.unembed_sums
from cdsurgery import Anatomy, ConfidentConfig, ConfidentOutput, InvalidInputError, Transform, UnsupportedModelError
from cdsurgery.anatomy import tail_logits
from cdsurgery.fused import fused_unembedding
from cdsurgery.zoo import HIDDEN, LAYERS, VOCABULARY

NAN, INF = float("nan"), float("inf")
LOOKBACK = 4
IDS = token_ids(3, 9)
# One of each kind of head. Tied are cohere and granite; gemma3n has its streams before the batch, deepseek_v4 after the
# positions; mamba and xlstm widen their logits.
FAMILIES = [
    ("llama", torch.float32),
    ("phi", torch.float32),  # bias
    ("gemma2", torch.float32),  # softcap
    ("gemma2", torch.bfloat16),
    ("cohere", torch.float16),  # scale
    ("granite", torch.float32),  # scale, as a divisor
    ("falcon_h1", torch.float32),  # multiplier
    ("inkling_text", torch.float32),  # its vocabulary is padded
    ("gemma3n_text", torch.float32),
    ("deepseek_v4", torch.float32),
    ("mamba", torch.bfloat16),
    ("xlstm", torch.bfloat16),  # softcap
]


@pytest.fixture(autouse=True)
def blocks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tiny model's logits fit in one: three for the 12 rows of a step, dozens for a prompt."""
    monkeypatch.setattr(cdsurgery.kernels.unembed_sums, "CPU_LOGITS", 1200)


def outputs(family: str, dtype: torch.dtype = torch.float32, **inputs: Any) -> tuple[ConfidentOutput, ConfidentOutput]:
    """What the fused and the full scan of the same model return."""
    return tuple(
        cdsurgery.wrap(tiny_model(family, dtype), lookback=LOOKBACK, scan=scan)(input_ids=IDS, **inputs)
        for scan in ("fused", "full")
    )


def same_selection(fused: ConfidentOutput, full: ConfidentOutput) -> None:
    """Blocks of the vocabulary are products of another shape, whose sums may differ in the last digits of float32."""
    assert torch.equal(fused.final_logits, full.final_logits)
    tolerance = 1e-5 if full.logits.dtype == torch.float32 else torch.finfo(full.logits.dtype).eps
    within = tolerance * float(full.final_logits.abs().max())
    assert fused.logits.dtype == full.logits.dtype
    torch.testing.assert_close(fused.entropy, full.entropy, rtol=1e-5, atol=1e-6)
    clear = (full.entropy.diff(dim=-1).abs() > 2e-5).all(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(fused.selected_layer[clear], full.selected_layer[clear])
    torch.testing.assert_close(fused.logits[clear], full.logits[clear], rtol=0, atol=within)
    assert full.selected_layer.max() == LAYERS > full.selected_layer.min()


@pytest.mark.parametrize(("family", "dtype"), FAMILIES, ids=str)
@torch.no_grad()
def test_a_wrapped_model_selects_in_one_pass_what_it_selects_in_full(family: str, dtype: torch.dtype) -> None:
    same_selection(*outputs(family, dtype))  # 108 rows of 64 numbers: the chosen ones are projected again
    if family != "xlstm":  # it returns all rows whatever it is asked for
        same_selection(*outputs(family, dtype, logits_to_keep=2))  # 24 rows, which are written


def candidate_states(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Final logits and K states of 3 x 9 rows that go back any number of layers, broken ones among them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(LOOKBACK + 1, 3, 9, HIDDEN, generator=generator)
    states[2, 0, 1], states[1, 1, 2, 5], states[1, 2, 3] = NAN, INF, 0
    final = tail_logits(model, model.anatomy, states[0])
    final[0, 4, 7], final[1, 5, 0] = NAN, -INF
    return final, list(states[1:])


@pytest.mark.parametrize("rows", [slice(0, 9), slice(0, 3)], ids=["projected again", "written"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@torch.no_grad()
def test_broken_candidates_never_win_and_draws_are_kept(rows: slice, share: float) -> None:
    found = {}
    for scan in ("fused", "full"):
        model = cdsurgery.wrap(tiny_model("phi"), lookback=LOOKBACK, scan=scan)
        final, states = candidate_states(model)
        allowed = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < share
        states = [state[:, rows] for state in states]
        assert fused_unembedding(model, model.anatomy).writes(3 * LOOKBACK * states[0].shape[1]) == (rows.stop == 3)
        found[scan] = model._select(final[:, rows], states, allowed[:, rows])
    logits, depth, entropy = found["fused"]
    assert torch.equal(depth, found["full"][1])
    assert len(depth.unique()) > 2
    torch.testing.assert_close(logits, found["full"][0], rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(entropy, found["full"][2], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert entropy.isnan().any()


@torch.no_grad()
def test_generate_writes_the_same_text() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = [
        cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan).generate(IDS, **options)
        for scan in ("fused", "full")
    ]
    assert torch.equal(*texts)


class Largest(TorchDispatchMode):
    """The most numbers that an operation in it returned, and how often the given weight was multiplied with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.numbers, self.products, self.passes = weight, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_weight = any(isinstance(one, Tensor) and one.data_ptr() == self.weight.data_ptr() for one in args)
        self.passes += of_weight and "unembed_sums" in str(func)
        self.products += of_weight and str(func) in ("aten.mm.default", "aten.addmm.default")
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.numbers = max([self.numbers, *(one.numel() for one in returned if isinstance(one, Tensor))])
        return result


@pytest.mark.parametrize(("keep", "products"), [(0, 2), (1, 1)], ids=["projected again", "written"])
@torch.no_grad()
def test_the_unembedding_is_read_once_for_all_candidates(keep: int, products: int) -> None:
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    with Largest(model.lm_head.weight) as seen:
        out = model(input_ids=IDS, logits_to_keep=keep)
    assert (seen.passes, seen.products) == (1, products)  # the products are the model's own, and the chosen states'
    rows = out.entropy.numel() // (LOOKBACK + 1) * LOOKBACK
    assert seen.numbers <= max(rows * VOCABULARY // LOOKBACK, VOCABULARY * HIDDEN)


def test_what_is_written_never_takes_more_than_the_unembedding() -> None:
    head = fused_unembedding(model := tiny_model("llama"), cdsurgery.wrap(model, lookback=1).anatomy)
    half = fused_unembedding(model := tiny_model("mamba", torch.bfloat16), cdsurgery.wrap(model, lookback=1).anatomy)
    with torch.no_grad():
        assert [head.writes(rows) for rows in (1, HIDDEN - 1, HIDDEN)] == [True, True, False]
        assert [half.writes(rows) for rows in (1, HIDDEN // 2 - 1, HIDDEN // 2)] == [True, True, False]
    assert not head.writes(1)


def test_a_gradient_reaches_the_selected_layers_logits() -> None:
    gradients = []
    for scan in ("fused", "full"):
        model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan=scan)
        out = model(input_ids=IDS, labels=IDS)
        assert not out.entropy.requires_grad
        out.loss.backward()
        gradients.append(model.lm_head.weight.grad)
    # Sums of 27 rows in another order, at gradients of size 1.
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert gradients[0].abs().max() > 1e-2


@pytest.mark.parametrize("keep", [0, 2], ids=["projected again", "written"])
@torch.no_grad()
def test_under_autocast_candidates_have_the_dtype_of_the_model(keep: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, full = outputs("llama", logits_to_keep=keep)
    assert full.logits.dtype == torch.bfloat16
    same_selection(fused, full)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize(("family", "dtype"), [("gemma2", torch.float32), ("phi", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("keep", [2, 1], ids=["two rows", "one row"])
@torch.no_grad()
def test_the_kernel_selects_what_pytorch_does(
    family: str, dtype: torch.dtype, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from kernel_truth import kernel

    ran: list[int] = []
    monkeypatch.setattr(cdsurgery.fused, "unembed_sums", lambda *given: (ran.append(1), kernel(*given))[1])
    fused, full = outputs(family, dtype, logits_to_keep=keep)
    assert len(ran) == 1
    same_selection(fused, full)


class Watched(nn.Linear):
    pass


def subclassed(model: Any) -> None:
    model.lm_head.__class__ = Watched


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.lm_head.forward = model.lm_head.forward


def in_columns(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.T.contiguous().T)


UNFIT = {
    subclassed: r"it is a test_fused\.Watched",
    hooked: "its forward is hooked or replaced",
    replaced: "its forward is hooked or replaced",
    in_columns: "with strides",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_head_that_no_kernel_knows_is_refused_when_wrapped_and_when_called(change: Any) -> None:
    message = rf"LlamaForCausalLM: scan='fused' cannot .* 'lm_head': .*{UNFIT[change]}.* Use scan='full' or 'lazy'"
    model = cdsurgery.wrap(tiny_model("llama"), lookback=LOOKBACK, scan="fused")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        model(input_ids=IDS)
    model = tiny_model("llama")
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        cdsurgery.wrap(model, lookback=LOOKBACK, scan="fused")
    assert not isinstance(model, cdsurgery.ConfidentHead)
    assert isinstance(cdsurgery.wrap(model, lookback=LOOKBACK, scan="full"), cdsurgery.ConfidentHead)


# PEFT 0.21 asks for a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_or_double_precision_head_is_refused() -> None:
    adapter = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"scan='fused' cannot .* it is a peft\.tuners\.lora.*Linear"):
        cdsurgery.wrap(peft.get_peft_model(tiny_model("llama"), adapter), lookback=1, scan="fused")
    with pytest.raises(UnsupportedModelError, match=r"its weight is torch.float64 on cpu"):
        cdsurgery.wrap(tiny_model("llama", torch.float64), lookback=1, scan="fused")


def test_a_head_that_lies_on_several_ranks_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model: Any = tiny_model("llama")
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        with pytest.raises(UnsupportedModelError, match=r"whose weight is a torch\.distributed.*DTensor"):
            fused_unembedding(model, tail_of())
    finally:
        dist.destroy_process_group()


def tail_of(*rows: Transform) -> Anatomy:
    layers = tuple(f"model.layers.{index}" for index in range(LAYERS))
    return Anatomy(layers, ("model.norm", "lm_head", *rows))


def test_what_else_is_done_to_logits_is_refused() -> None:
    softcap, scale = (
        next(row for row in cdsurgery.transforms.TRANSFORMS if row.name == name) for name in ("softcap", "scale")
    )
    model: Any = tiny_model("llama")
    model.config.final_logit_softcapping, model.config.logit_scale, model.config.odd = 8.0, 0.5, 1.0
    odd = Transform("scale", "odd", lambda z, value: z + value, "here")  # called like one that is known
    for rows, found in (
        ((odd,), r"its logits go through \(scale\)"),
        ((softcap, scale), r"\(scale\) comes after another"),
        ((scale, scale), r"\(scale\) comes after another"),
    ):
        with pytest.raises(UnsupportedModelError, match=found):
            fused_unembedding(model, tail_of(*rows))
    head = fused_unembedding(model, tail_of(scale, softcap))
    assert (head.scale, head.softcap) == (0.5, 8.0)
    model.config.logit_scale = torch.tensor(0.5)
    with pytest.raises(UnsupportedModelError, match=r"its logits go through \(scale\), whose value is tensor"):
        fused_unembedding(model, tail_of(scale))


def test_no_measure_but_entropy_is_fused() -> None:
    with pytest.raises(InvalidInputError, match="scan is 'fused' and measure 'log_p_squared'"):
        ConfidentConfig(measure="log_p_squared", scan="fused")

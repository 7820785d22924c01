"""Every family that transformers knows: what `wrap` proves is true of it, and docs/families.md says what was found.

For each of the proven: the plain model's logits, the logits of each candidate layer, entropies, selected layers, kept
rows, cached steps, and the plain model back. About half a second each.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import Truth, tiny_model, token_ids, truth
from torch import Tensor
from transformers import LogitsProcessor

import cdsurgery
from cdsurgery import ConfidentOutput, UnsupportedModelError
from cdsurgery.families import FAMILIES, Family, examine, markdown
from cdsurgery.one_pass import close_, open_
from cdsurgery.transforms import TRANSFORMS

LOOKBACK, ROWS, LENGTH, PROMPT = 3, 3, 12, 6
IDS = token_ids(ROWS, LENGTH)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"

# The 40 that are no decoder-only model, by the reason that `wrap` has to find.
HALVES = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus")
HALVES += ("plbart", "prophetnet", "trocr", "whisper")
ENCODERS = ("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie")
ENCODERS += (
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm",
    "xlm-roberta",
)
ENCODERS += ("xlm-roberta-xl", "xlnet", "xmod")
REFUSED = dict.fromkeys(
    HALVES, "is the decoder of an encoder-decoder: '.*attn' ran on no text, it attends to the states of an encoder"
)
REFUSED |= dict.fromkeys(ENCODERS, "is not causal: later tokens change the logits of earlier positions")
REFUSED |= dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    r"does not run on token ids alone \(ValueError: inputs_embeds and shared_kv_states cannot be None",
)
REFUSED |= {
    "blt": "'model.local_decoder.layers.1' does not start from what 'model.local_decoder.layers.0' returned",
    "git": "puts the patches of an image before the text",
    "hrm_text": r"ran in the order \[0, 1, 2, 3, 4, 5, 0, 1, .*not each once and in order",
    "musicgen": "has 2 language heads, one for each of its streams of tokens",
    "musicgen_melody": "has 2 language heads, one for each of its streams of tokens",
    "inkling2_text": "after 'model.layers.5' the state goes into 'model.final_input' beside other states",
    "reformer": "after 'reformer.encoder.layers.5' the state is changed by something that is not a module",
}
PROVEN = [family for family in FAMILIES if family not in REFUSED]


@dataclass(frozen=True)
class Case:
    """One wrapped forward of one family, and what is true of it."""

    family: str
    model: Any
    out: ConfidentOutput
    candidates: Tensor
    true: Truth


def case(family: str, dtype: torch.dtype = torch.float32) -> Case:
    # In half precision plain xlstm fails without a cache, on more than one chunk.
    true = truth(tiny_model(family, dtype), LOOKBACK, input_ids=IDS, use_cache=family == "xlstm")
    model = cdsurgery.wrap(tiny_model(family, dtype), lookback=LOOKBACK)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        select = cdsurgery.head.select_beside
        patch.setattr(
            cdsurgery.head,
            "select_beside",
            lambda z, earlier, *rest: (seen.append(torch.cat([z[None], earlier])), select(z, earlier, *rest))[1],
        )
        out = model(IDS)
    (candidates,) = seen
    return Case(family, model, out, candidates, true)


@pytest.fixture(scope="module", params=PROVEN)
def run(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def agree(run: Case) -> None:
    """Everything that one forward returns is what the plain model and float64 say."""
    assert run.out.final_logits.isfinite().all()
    assert torch.equal(run.out.final_logits, run.true.candidates[0])
    for k, candidate in enumerate(run.candidates):
        assert torch.equal(candidate, run.true.candidates[k]), f"layer L-{k}"
    # 1e-6 relative: what float32 sums of 256 terms leave (measured 2e-7, docs/numerics.md).
    torch.testing.assert_close(run.out.entropy.double(), run.true.entropy, rtol=1e-6, atol=0)
    gaps = run.true.entropy.diff(dim=-1).abs() / run.true.entropy[..., 1:]
    assert gaps.min() > 4e-6, "two entropies are too near for float32 to order them: take another seed"
    assert torch.equal(run.out.selected_layer, run.true.layer)
    assert torch.equal(run.out.logits, run.true.logits)
    # Against tautology: where nothing moves, or everything does, all of this holds without any selection.
    depths = len(run.model.anatomy.layers) - run.out.selected_layer
    assert {0, 1} <= set(depths.flatten().tolist())


def test_one_forward_says_what_the_plain_model_says_from_each_layer(run: Case) -> None:
    agree(run)


@torch.no_grad()
def test_so_does_one_pass_over_the_unembedding(run: Case) -> None:
    model = copy.copy(run.model)  # the same modules under other options
    model.confident = replace(model.confident, scan="fused")
    model._norm = open_(model, model.anatomy)
    out = model(IDS)
    close_(model, model._norm)
    # Products of another shape: sums of 64 terms in another order.
    within = 1e-5 * float(run.true.candidates.abs().max())
    torch.testing.assert_close(out.final_logits, run.true.candidates[0], rtol=0, atol=within)
    torch.testing.assert_close(out.entropy.double(), run.true.entropy, rtol=1e-4, atol=1e-5)
    same = out.selected_layer == run.true.layer
    assert same.float().mean() > 0.9
    torch.testing.assert_close(out.logits[same], run.true.logits[same], rtol=0, atol=within)


@pytest.mark.parametrize("family", PROVEN)
def test_so_it_does_in_bfloat16(family: str) -> None:
    """Where some keep their residual stream in float32, and some return float32 logits."""
    agree(case(family, torch.bfloat16))


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 7, 4])], ids=["last", "last three", "indices"])
def test_only_the_rows_asked_for_are_returned(run: Case, keep: int | Tensor) -> None:
    takes_it = "logits_to_keep" in inspect.signature(run.model.forward).parameters
    assert takes_it or run.family == "xlstm"
    rows = (slice(-keep, None) if isinstance(keep, int) else keep) if takes_it else slice(None)
    with torch.no_grad():
        out = run.model(IDS, logits_to_keep=keep)
    # Fewer rows make matrix products of another shape, whose sums differ in the last digits of float32.
    near(out, *(run.out[name][:, rows] for name in NAMES), tolerance=1e-5)


NAMES = ("logits", "final_logits", "entropy", "selected_layer")


def near(
    out: Any, logits: Tensor, final_logits: Tensor, entropy: Tensor, selected_layer: Tensor, *, tolerance: float
) -> None:
    """Equal but for `tolerance` of the largest logit, also in nats; layers where all gaps exceed twice that.

    Steps of `generate` are scanned lazily: no entropy behind the one that stopped the scan.
    """
    tolerance *= float(final_logits.abs().max())
    torch.testing.assert_close(out.final_logits, final_logits, rtol=0, atol=tolerance)
    measured = ~out.entropy.isnan()
    torch.testing.assert_close(out.entropy[measured], entropy[measured], rtol=0, atol=tolerance)
    clear = (entropy.diff(dim=-1).abs() > 2 * tolerance).all(-1)
    assert torch.equal(out.selected_layer[clear], selected_layer[clear])
    falling = (entropy.diff(dim=-1) < 0).cumprod(dim=-1).bool()
    assert measured[..., :2].all() and measured[..., 2:][falling[..., :-1] & clear[..., None]].all()
    torch.testing.assert_close(out.logits[clear], logits[clear], rtol=0, atol=tolerance)
    assert clear.float().mean() > 0.6  # of as few as three rows


def test_cached_steps_say_what_one_forward_says(run: Case) -> None:
    # A single cached step of rwkv mixes the rows of a batch, with or without us; see REMARKS.
    ids = IDS[:1] if run.family == "rwkv" else IDS
    plain, ours = (forced(model, ids) for model in (tiny_model(run.family), run.model))
    assert torch.equal(ours.final_logits, plain.logits)
    # Each step is a forward of other shapes. Recurrences sum in another order there: up to 3e-5 of the largest logit.
    near(ours, *(run.out[name][: len(ids), PROMPT - 1 : -1] for name in NAMES), tolerance=1e-4)


class Text(LogitsProcessor):
    """Lets only the next token of a given text be chosen."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids[:, [input_ids.shape[1]]], 0)


def forced(model: Any, ids: Tensor) -> Any:
    """What the forwards of `generate` return, one after the other, of the newest position: each `[B, T, ..]`."""
    steps: list[Any] = []
    update = model._update_model_kwargs_for_generation

    def note(outputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        steps.append(outputs)
        return update(outputs, *args, **kwargs)

    model.generation_config.eos_token_id = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_update_model_kwargs_for_generation", note)
        prompt, options = ids[:, :PROMPT], {"max_new_tokens": LENGTH - PROMPT, "do_sample": False}
        # The vocabulary of logits may be smaller than that of ids (inkling): such ids are never chosen.
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=[Text(ids)], **options)
    assert torch.equal(text, ids)
    names = [name for name in NAMES if name in steps[0]]
    return transformers.utils.ModelOutput({n: torch.stack([step[n][:, -1] for step in steps], 1) for n in names})


def test_unwrap_gives_the_plain_model_back(run: Case) -> None:
    model = tiny_model(run.family)
    plain_class, attributes = type(model), dict(model.__dict__)
    assert cdsurgery.unwrap(cdsurgery.wrap(model, lookback=LOOKBACK)) is model
    assert type(model) is plain_class and model.__dict__ == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, run.true.candidates[0])


@functools.cache
def found(family: str) -> Family:
    return examine(family)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_decoder_only_model_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as refusal:
        cdsurgery.wrap(tiny_model(family))
    assert type(tiny_model(family)).__name__ in str(refusal.value)
    assert found(family).proven is False


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_has_the_row_that_this_family_gives_now(family: str) -> None:
    row = markdown([found(family)]).splitlines()[-1]
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), "docs/families.md is stale: run make families"


def test_the_page_has_these_families_and_no_others() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\w-]+) \|", page, re.MULTILINE) == ["family", *FAMILIES]
    assert f"transformers {transformers.__version__} knows: of 189 families, 149 are proven and 40" in page


def lines_of(source: str) -> str:
    """The lines of the installed transformers that a link names."""
    link = re.fullmatch(r"https://github.com/huggingface/transformers/blob/v([\d.]+)/src/transformers/(.+)", source)
    assert link is not None and link[1] == transformers.__version__, source
    name, _, numbers = link[2].partition("#L")
    first, _, last = numbers.partition("-L")
    text = (Path(transformers.__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(text[int(first) - 1 : int(last or first)])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda row: f"{row.name}-{row.option}")
def test_the_link_of_a_transform_names_the_line_that_does_it(transform: Any) -> None:
    assert transform.option.removeprefix("final_") in lines_of(transform.source)


REMARKED = {
    "axk2": {"index_n_heads": 4},
    "deepseek_v32": {"index_n_heads": 4},
    "deepseek_v4": {"index_n_heads": 4},
    "dots3_note_text": {"index_n_heads": 4},
    "glm_moe_dsa": {"index_n_heads": 4},
    "hy_v4": {"index_n_heads": 4},
    "moshi": {"sliding_window": 4},
    "nemotron_h": {"time_step_min": 1e-3},
    "rwkv": {},
    "zamba2": {"time_step_min": 1e-3},
}


@pytest.mark.parametrize("family", REMARKED)
@torch.no_grad()
def test_where_cached_steps_are_said_to_differ_from_a_forward_those_of_the_plain_model_do(family: str) -> None:
    model = tiny_model(family, **REMARKED[family])
    full = model(IDS).logits
    apart = (forced(model, IDS).logits - full[:, PROMPT - 1 : -1]).abs().max()
    assert apart > 1e-4 * full.abs().max()  # where they agree, they do to 3e-5


def test_without_an_attention_layer_plain_bamba_does_not_generate() -> None:
    with pytest.raises(ValueError, match="get_seq_length"):
        forced(tiny_model("bamba", attn_layer_indices=[]), IDS)

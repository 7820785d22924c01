"""`verify` of quantised artifacts: against the model with their own weights, and by the noise of rounding."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from quantized import INT4, INT8, Case, artifact, wrapped

from cdsurgery import ArtifactError, export
from cdsurgery.entropy import entropy
from cdsurgery.export.parity.noise import NoiseReport


@pytest.mark.parametrize("case", [INT4, INT8], ids=str)
def test_verify_gives_the_model_its_own_weights_back(case: Case) -> None:
    model = copy.deepcopy(wrapped(case))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert export.verify(artifact(case), model).passed
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_verify_of_int4_sees_what_a_float_weight_is_off_by_one_in_ten_thousand() -> None:
    other = copy.deepcopy(wrapped(INT4))
    other.model.norm.weight.data.mul_(1.0001)
    assert not export.verify(artifact(INT4), other).passed


@pytest.mark.parametrize("case", [INT4, INT8], ids=str)
def test_verify_refuses_weights_that_are_no_rounding_of_the_models(case: Case) -> None:
    other = copy.deepcopy(wrapped(case))
    projection = other.model.layers[1].self_attn.q_proj.weight
    projection.data = projection.data.T.contiguous().roll(1)
    before = other.lm_head.weight.clone()
    with pytest.raises(ArtifactError, match=r"q_proj\.weight' is no quantised form of the model's"):
        export.verify(artifact(case), other)
    assert torch.equal(other.lm_head.weight, before)


def test_verify_of_int8_states_the_noise_and_fails_on_what_is_not_noise() -> None:
    report = export.verify(artifact(INT8), wrapped(INT8))
    assert isinstance(report, NoiseReport)
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["passed"]
    assert 0.001 < fields["noise"] < 0.2
    assert 0 < fields["relative"] < fields["relative_max"]
    assert 0 < fields["divergence"] < fields["divergence_max"]
    assert fields["rows"] * 0.7 < fields["equal"] <= fields["rows"]
    for part in ("by rounding in PyTorch", "mean", "max nats", "rows equal", "greedy tokens", "passed"):
        assert part in str(report)
    other = copy.deepcopy(wrapped(INT8))
    other.model.layers[2].post_attention_layernorm.weight.data.mul_(1.5)
    assert not export.verify(artifact(INT8), other).passed


def test_a_noise_report_holds_what_does_not_hang_on_noise() -> None:
    """Rows whose layer, or whose entropies, are not those of the logits that came with them."""
    logits = torch.tensor([[3.0, 1.0, 0.0]])
    h = entropy(logits)
    for layer, seen, passes in ((4, [h, h + 1], True), (3, [h, h + 1], False), (4, [h + 1e-3, h + 1], False)):
        report = NoiseReport(4, 0.05, entropy)
        rows = [logits, logits, torch.tensor([layer]), torch.stack(seen, dim=-1)]
        report.add_rows(rows, [logits + 0.01 * torch.randn(1, 3), logits, torch.tensor([4]), rows[3]])
        assert report.passed is passes
    assert not NoiseReport(4, 0.05, entropy).passed

"""Prompts -> greedy texts of an artifact and of its model; where two part, the margins that the choice hung on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cdsurgery.export.parity.lending import plain_generation
from cdsurgery.export.parity.noise import NoiseReport
from cdsurgery.export.parity.report import Report, logit_scale, measure_scale, scan_margin
from cdsurgery.export.parity.routing import RoutingMargins


def compare_texts(
    report: Report | NoiseReport, runner: Any, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> None:
    """Decode a left-padded batch greedily in both runtimes; where a text parts, look at what the choice hung on.

    Args:
        report: gets the texts.
        runner: the artifact.
        model: the wrapped model that is the truth for it.
        prompts: token ids.
        new_tokens: to decode for each.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # The texts must not end early: a minimum equal to the maximum keeps the end-of-text token out of both.
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    with plain_generation(runner, model):
        ours, theirs = (
            of.generate(ids.to(of.device), attention_mask=mask.to(of.device), **options)[:, longest:].cpu()
            for of in (runner, model)
        )
    for prompt, our_text, their_text in zip(prompts, ours, theirs, strict=True):
        report.texts += 1
        differing = (our_text != their_text).nonzero()
        if not len(differing):
            report.add_text(new_tokens, None)
            continue
        step = int(differing[0])
        before = torch.tensor([[*prompt, *their_text[:step].tolist()]], device=model.device)
        with RoutingMargins(*before.shape) as routing:
            row = model(before, logits_to_keep=1)
        logits = row.logits[0, 0].float()
        scale = logit_scale(row.final_logits)[0, 0]
        entropy_scale = measure_scale(model.confident.measure, row.entropy, scale, logits.numel())
        scale = scale.clamp(min=1)
        parting = {
            "text": report.texts,
            "layer_margin": float(scan_margin(row.entropy) / entropy_scale.min()),
            "token_margin": float((logits[their_text[step]] - logits[our_text[step]]).abs() / scale),
            "routing_margin": float(routing.margins.min()),
        }
        report.add_text(step, parting)

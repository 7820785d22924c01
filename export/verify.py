"""An artifact and the model it was made from -> do they say the same? Row by row, then token by token.

Shapes: for each, a prefill and two continuations of its cache, unpadded, left-padded and right-padded. Final logits and
entropies are compared on every row. Where two entropies on the scanned path lie closer than the two runtimes agree
there, either layer is right; such rows are left out of the comparison of layers and selected logits, and their share is
shown.
Tokens: greedy texts from both; where they part, the margin of the choice is shown, and must be within the tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.report import TOLERANCES, Report, logit_scale, scan_margin
from cdsurgery.export.runner import OnnxRunner, load
from cdsurgery.head import ConfidentHead
from cdsurgery.probe import at_rest

# (batch, prompt, first continuation, second continuation)
SHAPES = ((1, 1, 1, 1), (1, 7, 1, 5), (2, 3, 1, 1), (2, 16, 4, 1), (3, 9, 2, 7), (4, 5, 1, 3), (1, 33, 1, 1))
PADDINGS = ("none", "left", "right")
TEXTS_AT_ONCE = 16


def verify(
    artifact: str | os.PathLike[str] | OnnxRunner,
    model: ConfidentHead,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 8,
) -> Report:
    """Compare an artifact with the wrapped model it was made from.

    Args:
        artifact: its folder, or an opened one.
        model: wrapped with the options that the artifact was made with.
        prompts: token ids to decode greedily from; None takes a few random ones.
        new_tokens: to decode for each prompt.

    Raises:
        InvalidInputError: the model is not wrapped, or with other options.
        ArtifactError: the artifact cannot be opened.
    """
    runner = artifact if isinstance(artifact, OnnxRunner) else load(artifact)
    _check_options(runner, model)
    report = Report(TOLERANCES[runner.manifest.dtype], runner.manifest.layers)
    generator = torch.Generator().manual_seed(0)
    with at_rest(model):  # type: ignore[arg-type]  # a wrapped model is a PreTrainedModel too
        for shape in SHAPES:
            for padding in PADDINGS:
                _compare_shape(report, runner, model, shape, padding, generator)
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        prompts = prompts or [
            torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (1, 2, 3, 5, 8, 13)
        ]
        for first in range(0, len(prompts), TEXTS_AT_ONCE):
            _compare_texts(report, runner, model, prompts[first : first + TEXTS_AT_ONCE], new_tokens)
    return report


def _check_options(runner: OnnxRunner, model: Any) -> None:
    if not isinstance(model, ConfidentHead):
        raise InvalidInputError(
            f"This {type(model).__name__} is not wrapped. Compare with what cdsurgery.wrap returned."
        )
    config, manifest = model.confident, runner.manifest
    for name in ("lookback", "probability", "measure", *(["seed"] if 0 < config.probability < 1 else [])):
        if getattr(config, name) != getattr(manifest, name):
            raise InvalidInputError(
                f"The artifact was made with {name}={getattr(manifest, name)!r}, the model is wrapped with "
                f"{name}={getattr(config, name)!r}. Wrap it with the artifact's options to compare them."
            )


def _compare_shape(
    report: Report, runner: OnnxRunner, model: Any, shape: Sequence[int], padding: str, generator: torch.Generator
) -> None:
    """Prefill, then continue the cache twice, in both runtimes, each with its own cache."""
    batch, *chunks = shape
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, sum(chunks)), generator=generator)
    mask = _padded_mask(batch, chunks, padding)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    ours, theirs = None, DynamicCache(config=model.config)
    for start, end in _spans(chunks):
        inputs = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        found = runner(**inputs, past_key_values=ours)
        on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        truth = model(**on_device, past_key_values=theirs, use_cache=True)
        ours = found.past_key_values
        real = mask[:, start:end].bool()
        if runner.manifest.positions == "last":
            last = (real * torch.arange(1, end - start + 1)).amax(dim=-1, keepdim=True) - 1
            kept = (torch.arange(batch)[:, None], last.clamp(min=0))
            truth_rows = [truth[name].cpu()[kept] for name in _FIELDS]
            real = real[kept]
        else:
            truth_rows = [truth[name].cpu() for name in _FIELDS]
        report.add_rows([found[name][real] for name in _FIELDS], [rows[real] for rows in truth_rows])


_FIELDS = ("logits", "final_logits", "selected_layer", "entropy")


def _padded_mask(batch: int, chunks: Sequence[int], padding: str) -> Tensor:
    """Ones, with row r padded by up to r tokens at one side of its prompt."""
    mask = torch.ones(batch, sum(chunks), dtype=torch.int64)
    for row in range(batch):
        padded = min(row, chunks[0] - 1)
        if padding == "left":
            mask[row, :padded] = 0
        elif padding == "right":
            mask[row, chunks[0] - padded : chunks[0]] = 0
    return mask


def _spans(chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for chunk in chunks:
        yield start, start + chunk
        start += chunk


def _compare_texts(report: Report, runner: Any, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Decode a left-padded batch greedily in both runtimes; where a text parts, look at what the choice hung on."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # The texts must not end early: a minimum equal to the maximum keeps the end-of-text token out of both.
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    ours = runner.generate(ids.to(runner.device), attention_mask=mask.to(runner.device), **options)[:, longest:].cpu()
    theirs = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **options)[:, longest:].cpu()
    for prompt, our_text, their_text in zip(prompts, ours, theirs, strict=True):
        report.texts += 1
        differing = (our_text != their_text).nonzero()
        if not len(differing):
            report.add_text(new_tokens, None)
            continue
        step = int(differing[0])
        before = torch.tensor([[*prompt, *their_text[:step].tolist()]], device=model.device)
        row = model(before, logits_to_keep=1)
        logits = row.logits[0, 0].float()
        scale = logit_scale(row.final_logits)[0, 0].clamp(min=1)
        parting = {
            "text": report.texts,
            "layer_margin": float(scan_margin(row.entropy) / scale),
            "token_margin": float((logits[their_text[step]] - logits[our_text[step]]).abs() / scale),
        }
        report.add_text(step, parting)

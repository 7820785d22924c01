"""An artifact and the model it was made from -> do they say the same? Row by row, then token by token.

Shapes: for each, a prefill and two continuations of its cache, unpadded, left-padded and right-padded. Final logits and
entropies are compared on every row. Where two entropies on the scanned path lie closer than the two runtimes agree
there, either layer is right; such rows are left out of the comparison of layers and selected logits, and their share is
shown. Of an engine the shapes are those that its profiles take.
Tokens: greedy texts from both; where they part, the margin of the choice is shown, and must be within the tolerance.
Noise: where a difference is above the tolerance, the model is run in a wider dtype too, to see how far PyTorch itself
is from that. Some models amplify rounding, and no second runtime can be closer to them than they are to themselves.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cdsurgery.entropy import MEASURES
from cdsurgery.errors import InvalidInputError
from cdsurgery.export.graph.precision import computing_model
from cdsurgery.export.parity.dequantization import borrowed_weights
from cdsurgery.export.parity.lending import measuring_all
from cdsurgery.export.parity.noise import NoiseReport, rounding_noise
from cdsurgery.export.parity.report import TOLERANCES, Report, logit_scale, measure_scale
from cdsurgery.export.parity.routing import RoutingMargins
from cdsurgery.export.parity.shapes import comparable_shapes, padded_mask, paddings, spans, takes
from cdsurgery.export.parity.texts import compare_texts
from cdsurgery.export.runtime.runner import OnnxRunner, Runner, load
from cdsurgery.head import ConfidentHead
from cdsurgery.probe import at_rest
from cdsurgery.wrap import adapted_model

AnyReport = Report | NoiseReport

TEXTS_AT_ONCE = 16


def verify(
    artifact: str | os.PathLike[str] | Runner,
    model: ConfidentHead,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 8,
) -> AnyReport:
    """Compare an artifact with the wrapped model it was made from.

    Args:
        artifact: its folder or that of an engine, or an opened one.
        model: wrapped with the options that the artifact was made with.
        prompts: token ids to decode greedily from; None takes a few random ones, as long as an engine takes them.
        new_tokens: to decode for each prompt.

    A quantised artifact is compared with the model under the artifact's own weights, which must be roundings of the
    model's.

    Raises:
        InvalidInputError: the model is not wrapped, or with other options, or not the one that the artifact was made
            from; or an engine takes none of the shapes.
        ArtifactError: the artifact cannot be opened, or its quantised weights are not those of the model.
    """
    runner, model = artifact if isinstance(artifact, Runner) else load(artifact), adapted_model(model)
    _check_options(runner, model)
    shapes, sides = comparable_shapes(runner), paddings(runner)
    truth: Any = computing_model(model, runner.manifest.options)
    borrowing = borrowed_weights(runner.folder, truth) if isinstance(runner, OnnxRunner) else nullcontext(())
    with at_rest(truth), measuring_all(truth), borrowing as borrowed:
        report = _report(runner, truth, borrowed)
        _compare_rows(report, runner, truth, shapes, sides)
        if runner.manifest.options.positions != "score":
            generator = torch.Generator().manual_seed(0)
            vocabulary = truth.config.get_text_config().vocab_size
            prompts = prompts or [
                torch.randint(vocabulary, (length,), generator=generator).tolist()
                for length in (1, 2, 3, 5, 8, 13)
                if takes(runner, 1, [length, *[1] * (new_tokens - 1)])
            ]
            at_once = TEXTS_AT_ONCE if "left" in sides else 1  # texts of a batch are padded there
            rows = max(count for count in range(1, at_once + 1) if takes(runner, count, [1]) or count == 1)
            for first in range(0, len(prompts), rows):
                compare_texts(report, runner, truth, prompts[first : first + rows], new_tokens)
        if isinstance(report, Report) and not report.close:
            report.noise = Report(report.tolerance, report.depth)
            _compare_rows(report.noise, truth, _wider(truth), shapes, sides)
    return report


def _report(runner: Runner, truth: Any, borrowed: Collection[str]) -> AnyReport:
    """An empty report of the kind that the artifact's arithmetic asks for."""
    made = runner.manifest
    if made.quantization is None or made.quantization["scheme"] != "int8":
        return Report(TOLERANCES[str(truth.dtype).removeprefix("torch.")], made.layers)
    return NoiseReport(made.layers, rounding_noise(truth, borrowed), MEASURES[made.confident.measure])


def _wider(model: Any) -> Any:
    """A copy of the model in the next wider dtype."""
    copied = copy.deepcopy(model)
    if copied._can_set_experts_implementation():
        copied.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return copied.to(torch.float64 if model.dtype == torch.float32 else torch.float32)


def _check_options(runner: Runner, model: Any) -> None:
    if not isinstance(model, ConfidentHead):
        raise InvalidInputError(
            f"This {type(model).__name__} is not wrapped. Compare with what cdsurgery.wrap returned."
        )
    found = _described(str(model.dtype).removeprefix("torch."), len(model.anatomy.layers), model.config)
    wanted = _described(runner.manifest.dtype, runner.manifest.layers, runner.config)
    if found != wanted:
        raise InvalidInputError(
            f"The artifact is of another model, or of another dtype of it: it has {wanted}, this "
            f"{type(model).__name__} has {found}. Compare it with what it was made from."
        )
    config, made = model.confident, runner.manifest.confident
    for name in ("lookback", "probability", "measure", *(["seed"] if 0 < config.probability < 1 else [])):
        if getattr(config, name) != getattr(made, name):
            raise InvalidInputError(
                f"The artifact was made with {name}={getattr(made, name)!r}, the model is wrapped with "
                f"{name}={getattr(config, name)!r}. Wrap it with the artifact's options to compare them."
            )


def _described(dtype: str, layers: int, config: Any) -> str:
    return f"{dtype}, {layers} layers and {config.get_text_config().vocab_size} tokens"


def _compare_rows(
    report: AnyReport, found: Any, truth: Any, shapes: Sequence[Sequence[int]], sides: Sequence[str]
) -> None:
    """All shapes and paddings, in an artifact or a model and in the model that is the truth for it."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        for padding in sides:
            _compare_shape(report, found, truth, shape, padding, generator)


def _compare_shape(
    report: AnyReport, found: Any, truth: Any, shape: Sequence[int], padding: str, generator: torch.Generator
) -> None:
    """Prefill, then continue the cache twice, each with its own cache."""
    batch, *chunks = shape
    vocabulary = truth.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, sum(chunks) + 1), generator=generator)
    mask = padded_mask(batch, chunks, padding)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    caches: list[Any] = [None, None]
    closest = torch.ones(batch, 1)
    for start, end in spans(chunks):
        inputs = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        targets, real = ids[:, start + 1 : end + 1], mask[:, start:end].bool()
        last_only = _positions(found) == "last"
        kept = _last_rows(real) if last_only else tuple(real.nonzero().unbind(-1))
        # Rows that are not compared are not projected: M x V numbers each, several times over in an entropy.
        first = int(kept[1].min()) if last_only else 0
        sides = [_run(found, inputs, caches[0], targets)]
        with RoutingMargins(batch, end - start) as routing:
            sides.append(_run(truth, inputs, caches[1], targets, end - start - first))
        caches = [run.past_key_values for run in sides]
        # A token that goes to other experts changes all that attend to it.
        closest = torch.cat([closest, routing.margins], dim=1).cummin(dim=1).values[:, 1:]
        wanted = targets if _positions(found) == "score" else None
        projected = (kept[0], kept[1] - first)
        ours, theirs = _rows(sides[0], kept, wanted), _rows(sides[1], projected, wanted)
        if isinstance(found, Runner) and found.manifest.options.scan == "lazy":
            ours[-1] = _with_unmeasured(ours[-1], theirs[-1], found.manifest.layers - ours[-2])
        scale, routing = logit_scale(sides[1].final_logits.cpu()[projected]), closest[kept]
        if not isinstance(found, Runner):
            # Eager attention makes NaN of rows beside padding in float64: they do not show how noisy the model is.
            known = theirs[1].isfinite().all(dim=-1)
            ours, theirs, scale, routing = _some(ours, known), _some(theirs, known), scale[known], routing[known]
        entropy_scale = measure_scale(truth.confident.measure, theirs[-1], scale, vocabulary)
        report.add_rows(ours, theirs, scale, routing, entropy_scale)
        closest = closest[:, -1:]


def _some(fields: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [field[rows] for field in fields]


def _positions(model: Any) -> str:
    return model.manifest.options.positions if isinstance(model, Runner) else "all"


def _run(model: Any, inputs: dict[str, Tensor], cache: Any, targets: Tensor, rows: int = 0) -> Any:
    """Run an artifact, or a model that projects its last `rows` positions; 0 for all."""
    if isinstance(model, Runner):
        return model(**inputs, past_key_values=cache, targets=targets if _positions(model) == "score" else None)
    cache = DynamicCache(config=model.config) if cache is None else cache
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return model(**on_device, past_key_values=cache, use_cache=True, logits_to_keep=rows)


def _last_rows(real: Tensor) -> tuple[Tensor, ...]:
    """Row and column of each text's last token that is `real` `[B, S]`."""
    last = (real * torch.arange(1, real.shape[1] + 1)).amax(dim=-1) - 1
    return torch.arange(len(real)), last.clamp(min=0)


def _rows(run: Any, kept: tuple[Tensor, ...], targets: Tensor | None) -> list[Tensor]:
    """Selected and final logits (or log-probabilities of the targets), layers and entropies of the kept rows."""
    if run.logits is None:  # an artifact that scores
        fields = [run.logprobs[..., None], run.final_logprobs[..., None], run.selected_layer, run.entropy]
    else:
        logits = [run.logits.cpu(), run.final_logits.cpu()]
        if targets is not None:
            wide = [z if z.dtype == torch.float64 else z.float() for z in logits]
            logits = [z.log_softmax(dim=-1).gather(-1, targets[..., None]) for z in wide]
        fields = [*logits, run.selected_layer.cpu(), run.entropy.cpu()]
    one = fields[0].shape[1] == 1  # an artifact that returns last rows only
    return [field[kept[0], 0 if one else kept[1]] for field in fields]


def _with_unmeasured(entropy: Tensor, true_entropy: Tensor, depth: Tensor) -> Tensor:
    """The entropies `[R, M]` of a lazy graph, those that it may leave out taken from the truth.

    It may leave out what lies behind the candidate that stopped the scan at `depth` `[R]`, and nothing before.
    """
    behind = torch.arange(entropy.shape[-1]) > depth[:, None] + 1
    return torch.where(behind & entropy.isnan(), true_entropy, entropy)

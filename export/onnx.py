"""A wrapped model -> an ONNX artifact: one graph for prefill and decode, verified before it appears.

1. Signature: the names and shapes of the graph.
2. Trace: transformers' own exporter turns the `DecoderGraph` into an ONNX model.
3. Name: inputs, outputs and axes get the names of the signature; what only the tracer needed is dropped.
4. Save: graph, weights beside it, configs, tokenizer, all in a folder that is moved into place at the end.
5. Verify: the saved files run in ONNX Runtime against the model. An artifact that differs is never left behind.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch.export import Dim
from transformers import PreTrainedTokenizerBase
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter, use_experts_implementation

from cdsurgery.errors import ArtifactError, InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE, write_client_files
from cdsurgery.export.artifact.manifest import SCHEMA_VERSION, Manifest, describe_files, maker_versions
from cdsurgery.export.artifact.staging import staged_folder
from cdsurgery.export.graph.admission import failures_named, traceable_model
from cdsurgery.export.graph.decoder import DecoderGraph, sample_inputs
from cdsurgery.export.graph.delta_rule import expand_delta_rule
from cdsurgery.export.graph.linear_attention import traceable_linear_attention
from cdsurgery.export.graph.precision import computing_model, narrow_weights_, providers_for
from cdsurgery.export.graph.quantization import Scheme, quantizable, quantize
from cdsurgery.export.graph.quiet import quiet
from cdsurgery.export.graph.weights import multiply_in_place, name_weights
from cdsurgery.export.options import OPSET, GraphOptions, Positions, Scan, Target
from cdsurgery.export.parity.verify import verify
from cdsurgery.export.runtime.runner import OnnxRunner
from cdsurgery.export.signature import Signature, TensorSpec, decoder_signature
from cdsurgery.head import ConfidentHead
from cdsurgery.probe import at_rest


def to_onnx(
    model: ConfidentHead,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    positions: Positions = "last",
    target: Target = "portable",
    upcast: bool = False,
    scan: Scan = "static",
    quantization: Scheme | None = None,
    quantize_head: bool = True,
    parity: bool = True,
) -> Path:
    """Export a wrapped model.

    Args:
        model: what `cdsurgery.wrap` returned, in float32, float16 or bfloat16.
        folder: the artifact to make; it must not exist.
        tokenizer: saved beside the graph, for clients that take text.
        positions: "last" returns logits `[B, 1, V]` of each row's last real token; "all" `[B, S, V]`; "score" the
            log-probabilities `[B, S]` of given targets, with the logits of no more than one candidate in memory.
        target: "portable" for standard operators, "cpu" or "cuda" for those of that provider of ONNX Runtime.
        upcast: keep half-precision weights and compute in float32, as ONNX Runtime's CPU needs it for bfloat16.
        scan: "static" projects all candidates at once, for any runtime; "lazy" those before layer L-1 for the rows that
            get that far, for a runtime that takes tensors of any number of rows, none among them, as ONNX Runtime does.
            The other entropies are NaN then.
        quantization: "int4" (weights) or "int8" (weights and activations) quantises the matrices; None leaves them.
        quantize_head: whether the unembedding, and with it a tied embedding, is among them.
        parity: run the artifact against the model before it appears. False is for graphs that cannot run here, such
            as bfloat16 ones made on a CPU for TensorRT; the manifest then says that there was no comparison.

    Returns:
        The folder.

    Raises:
        InvalidInputError: the model is not wrapped, an option or the tokenizer is not one of those above, or the
            generation config contradicts itself.
        UnsupportedModelError: the model or its cache cannot be exported, or its graph cannot be run here.
        ArtifactError: the folder exists, or the graph does not agree with the model.
    """
    model = traceable_model(model)
    options = GraphOptions(positions, target, upcast, scan)
    if quantization is None and not quantize_head:
        raise InvalidInputError(
            "quantize_head is False and quantization None: nothing is quantised. Leave quantize_head out, or ask for "
            "quantization='int4' or 'int8'."
        )
    providers = providers_for(model, options) if parity else []
    computing = computing_model(model, options)
    names = quantizable(computing, options, quantization, quantize_head) if quantization is not None else set()
    with staged_folder(folder) as aside:
        with failures_named(model):
            signature = decoder_signature(computing, options)
        # Before what takes long, as configs and tokenizers may refuse to be saved.
        not_for = write_client_files(aside, model, signature, tokenizer)
        with failures_named(model):
            graph = _trace(computing, signature, options)
        _name(graph, signature)
        name_weights(graph, computing)
        multiply_in_place(graph)
        weights = set(graph.graph.initializers)
        done = None
        if quantization is not None:
            quantized = quantize(graph, quantization, names, aside)
            left = [name for name, weight in model.named_parameters() if weight.ndim > 1 and name not in quantized]
            done = {"scheme": quantization, "head": quantize_head, "float": left}
        if upcast:
            narrow_weights_(graph, model.dtype, weights)  # type: ignore[arg-type]  # a wrapped model is a PreTrainedModel too
        onnx_ir.save(graph, aside / GRAPH_FILE, external_data=f"{GRAPH_FILE}.data")
        manifest = _manifest(model, signature, options, not_for, done)
        runner = OnnxRunner(aside, manifest, providers, weights_in_place=done is None) if parity else None
        report = verify(runner, model) if runner is not None else None
        if report is not None and not report.passed:
            raise ArtifactError(f"The exported graph does not agree with the model, so it was not kept.\n{report}")
        passed = None if report is None else report.to_dict()
        Manifest(**(vars(manifest) | {"files": describe_files(aside), "parity": passed})).write(aside)
    return Path(folder)


def _trace(model: Any, signature: Signature, options: GraphOptions) -> onnx_ir.Model:
    inputs = sample_inputs(model, signature)
    dynamic = {
        spec.name: {axis: Dim.AUTO for axis, size in enumerate(spec.axes) if isinstance(size, str)}
        for spec in signature.inputs
    }
    shapes: dict[str, Any] = {name: dynamic[name] for name in inputs if name in dynamic}
    shapes["past"] = [dynamic[spec.name] for spec in signature.past]
    fusions = options.target if options.target != "portable" and _can_fuse(model, signature) else None
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET, ort_fusions=fusions)
    exporter: Any = OnnxExporter
    tracing = traceable_linear_attention(model, options.target)
    # The form of experts without a histogram of tokens: it is what fuses into ONNX Runtime's MoE operator, and TensorRT
    # has no ScatterElements that adds.
    experts = use_experts_implementation(model, "batched_mm")
    with at_rest(model), DecoderGraph(model, signature, options) as graph, tracing, experts, quiet():
        program: onnx_ir.Model = exporter().export(graph, inputs, config=config).program
    expand_delta_rule(program)
    return program


def _can_fuse(model: Any, signature: Signature) -> bool:
    """Whether transformers' fusions leave the graph what it is.

    In half precision they join tensors of two dtypes into one norm, which ONNX Runtime refuses, around the float32
    operators of linear attention and in Gemma's norms, whose scales are float32. Of gpt_oss they make another model.
    """
    family = model.config.get_text_config().model_type
    changed = "gemma" in family or family == "gpt_oss" or any(one.name.endswith(".recurrent") for one in signature.past)
    return model.dtype == torch.float32 or not changed


def _name(model: onnx_ir.Model, signature: Signature) -> None:
    """Give the graph the signature's names and axes, and drop the tracer's notes: nine tenths of the file."""
    graph = model.graph
    outside = {*graph.inputs, *graph.outputs}
    for values, specs in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        for value, spec in zip(values, specs, strict=True):
            _check_fixed_axes(value, spec)
            value.name, value.shape = spec.name, onnx_ir.Shape(spec.axes)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outside:
                value.shape = None  # in the tracer's symbols, which the new axis names have replaced
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "cdsurgery"


def _check_fixed_axes(value: onnx_ir.Value, spec: TensorSpec) -> None:
    """A traced axis that became a number where the signature has a name was frozen by the tracer."""
    assert value.shape is not None
    frozen = [
        axis
        for axis, size in zip(spec.axes, value.shape, strict=True)
        if isinstance(axis, str) and isinstance(size, int)
    ]
    if frozen:
        raise ArtifactError(
            f"Tracing fixed the axes {frozen} of '{spec.name}' {list(spec.axes)} at {value.shape}; the graph would be "
            "right for one shape only. This model's code computes a shape from its example; please report it."
        )


def _manifest(
    model: Any,
    signature: Signature,
    options: GraphOptions,
    not_for: dict[str, str],
    quantization: dict[str, Any] | None,
) -> Manifest:
    config = replace(model.confident, scan="lazy" if options.scan == "lazy" else "full")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        versions=maker_versions(),
        model_type=model.config.model_type,
        layers=len(model.anatomy.layers),
        confident=config,
        dtype=str(model.dtype).removeprefix("torch."),
        options=options,
        opset=OPSET,
        signature=signature,
        files={},
        not_for=not_for,
        parity=None,
        quantization=quantization,
    )

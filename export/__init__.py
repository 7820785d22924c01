"""A wrapped model -> artifacts that run without it, with the selection inside: ONNX, and what is made from it.

    from cdsurgery import export

    export.to_onnx(model, "artifact/")            # one graph for prefill and decode
    export.graft("model.onnx", "artifact/")       # the same on a decoder that is an ONNX file already
    export.to_tensorrt("artifact/", "engine/")    # a TensorRT engine of it
    runner = export.load("artifact/")             # ONNX Runtime: same call, same fields, .generate()
    print(export.verify("artifact/", model))      # parity with PyTorch, row by row
    export.to_triton("artifact/", "repository/", name="my-llm")  # text from Triton Inference Server

Where to look: `options` (what can be asked for), `signature` (the names and shapes that everything else follows),
`onnx` (from a model to a folder), and the rooms: `graph` (what is traced, and what is done to it), `artifact` (the
files of the folder), `runtime` (running it), `parity` (comparing it with the model), `graft` (the same for a foreign
file), `tensorrt` (engines of it), `triton` (serving it).
"""

from importlib.util import find_spec

if __name__ != "cdsurgery.export":
    raise ImportError(f"This folder is the package cdsurgery.export; it was imported as {__name__}.")

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
    raise ImportError(f"cdsurgery.export needs {', '.join(missing)}. Install with: pip install 'cdsurgery[onnx]'")

from cdsurgery.export.graft import graft as graft
from cdsurgery.export.onnx import to_onnx as to_onnx
from cdsurgery.export.parity.report import Report as Report
from cdsurgery.export.parity.verify import verify as verify
from cdsurgery.export.runtime.runner import OnnxRunner as OnnxRunner
from cdsurgery.export.runtime.runner import load as load
from cdsurgery.export.tensorrt import head_to_tensorrt as head_to_tensorrt
from cdsurgery.export.tensorrt import to_tensorrt as to_tensorrt
from cdsurgery.export.triton.options import ServingOptions as ServingOptions
from cdsurgery.export.triton.repository import to_triton as to_triton

__all__ = [
    "OnnxRunner",
    "Report",
    "ServingOptions",
    "graft",
    "head_to_tensorrt",
    "load",
    "to_onnx",
    "to_tensorrt",
    "to_triton",
    "verify",
]

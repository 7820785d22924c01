"""A wrapped model -> artifacts that run without it, with the selection inside: ONNX, and what is made from it.

    from cdsurgery import export

    export.to_onnx(model, "artifact/")            # one graph for prefill and decode
    export.graft("model.onnx", "artifact/")       # the same on a decoder that is an ONNX file already
    runner = export.load("artifact/")             # ONNX Runtime: same call, same fields, .generate()
    print(export.verify("artifact/", model))      # parity with PyTorch, row by row

Where to look: `signature` (the names and shapes that everything else follows), `graph` (what is traced), `onnx` (how it
becomes a file), `graft` (how a foreign file becomes an artifact), `manifest` (what is written about it), `clients`
(what others read of it), `runner` (how it runs), `session` (on which device), `verify` (whether it is the same).
"""

from importlib.util import find_spec

if __name__ != "cdsurgery.export":
    raise ImportError(f"This folder is the package cdsurgery.export; it was imported as {__name__}.")

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
    raise ImportError(f"cdsurgery.export needs {', '.join(missing)}. Install with: pip install 'cdsurgery[onnx]'")

from cdsurgery.export.graft import graft as graft
from cdsurgery.export.onnx import to_onnx as to_onnx
from cdsurgery.export.report import Report as Report
from cdsurgery.export.runner import OnnxRunner as OnnxRunner
from cdsurgery.export.runner import load as load
from cdsurgery.export.verify import verify as verify

__all__ = ["OnnxRunner", "Report", "graft", "load", "to_onnx", "verify"]

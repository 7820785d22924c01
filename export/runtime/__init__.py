"""An artifact in ONNX Runtime, behind the interface of a transformers model."""

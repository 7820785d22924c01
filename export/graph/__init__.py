"""What is inside model.onnx: a wrapped model as a function of tensors, and what is done to its graph."""

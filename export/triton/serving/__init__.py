"""A version folder of a Triton repository -> text: the code that is copied into it and runs in the server.

It needs numpy, tokenizers and onnxruntime and nothing else, so its modules import each other by relative names: in the
server their package is the version folder, `1`. Where to look: `model` is what Triton calls, `scheduler` the loop,
`sequence` one request on its way.
"""

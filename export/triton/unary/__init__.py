"""A version folder of the unary twin -> KServe's unary protocol: `model` is copied there and runs in the server."""

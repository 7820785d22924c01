"""Run by the Python of `.venv-triton`: config.pbtxt on stdin -> JSON, through Triton's protobuf classes."""

import sys

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

config = text_format.Parse(sys.stdin.read(), ModelConfig())
print(json_format.MessageToJson(config, preserving_proto_field_name=True))

"""Run by optimum's own Python: jobs as JSON on stdin -> what ORTModelForCausalLM makes of them, as JSON on stdout.

It knows nothing of cdsurgery, which needs a newer transformers. A job has `folder`, `io_binding`, `new_tokens`, and
either `text` or `input_ids` and `attention_mask`.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def run(job):
    model = ORTModelForCausalLM.from_pretrained(job["folder"], use_io_binding=job["io_binding"])
    assert model.use_io_binding is job["io_binding"]
    settings = {"max_new_tokens": job["new_tokens"], "do_sample": False, "pad_token_id": 0}
    if "text" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        inputs = tokenizer(job["text"], return_tensors="pt")
        text = model.generate(**inputs, **settings)
        return {"input_ids": inputs["input_ids"].tolist(), "text": tokenizer.decode(text[0])}
    inputs = {name: torch.tensor(job[name]) for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    return {"logits": logits.double().tolist(), "tokens": model.generate(**inputs, **settings).tolist()}


json.dump([run(job) for job in json.load(sys.stdin)], sys.stdout)

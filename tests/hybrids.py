"""A hybrid model -> its graph in ONNX Runtime, and plain transformers to compare with."""
from __future__ import annotations
import sys, time
from typing import Any
import numpy as np
import onnx_ir, onnxruntime, torch
from families import VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from cdsurgery.export.linear_attention import linear_layer, linear_states, traceable_linear_attention
from cdsurgery.export.onnx import _quiet

def cache_tensors(cache):
    return [t for layer in cache.layers for t in (linear_states(layer) if isinstance(layer, LinearAttentionLayer) else (layer.keys, layer.values))]

class Body(nn.Module):
    def __init__(self, model):
        super().__init__(); self.model=model; self.config=model.config
    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        cache = DynamicCache(config=self.config)
        for i, pair in enumerate(zip(past_key_values[::2], past_key_values[1::2])):
            if isinstance(cache.layers[i], LinearAttentionLayer): cache.layers[i] = linear_layer(*pair)
            else: cache.layers[i].update(*pair)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
        return {"logits": logits, **{f"present.{i}": t for i,t in enumerate(cache_tensors(cache))}}

def empty(model, batch, past=0):
    c=model.config; out=[]
    conv=c.linear_key_head_dim*c.linear_num_key_heads*2+c.linear_value_head_dim*c.linear_num_value_heads
    for kind in c.layer_types:
        if kind=="linear_attention": out+= [torch.zeros(batch,conv,c.linear_conv_kernel_dim-1),torch.zeros(batch,c.linear_num_value_heads,c.linear_key_head_dim,c.linear_value_head_dim)]
        else: out += [torch.zeros(batch,c.num_key_value_heads,past,c.head_dim)]*2
    return out
def export(model, target):
    mask=torch.ones(2,7,dtype=torch.int64); mask[0,:2]=0
    inputs={"input_ids":torch.arange(6).view(2,3),"attention_mask":mask,"position_ids":(mask.cumsum(-1)-1).clamp(min=0)[:,-3:],"past_key_values":empty(model,2,4)}
    A=Dim.AUTO
    shapes={"input_ids":{0:A,1:A},"attention_mask":{0:A,1:A},"position_ids":{0:A,1:A},
      "past_key_values":[s for k in model.config.layer_types for s in (({0:A},{0:A}) if k=="linear_attention" else ({0:A,2:A},)*2)]}
    with torch.no_grad(), traceable_linear_attention(target), _quiet():
        return OnnxExporter().export(Body(model), inputs, config=OnnxConfig(dynamic_shapes=shapes, opset_version=20)).program
if __name__=="__main__":
    fam,target,n=sys.argv[1],sys.argv[2],int(sys.argv[3]) if len(sys.argv)>3 else 6
    model=tiny_model(fam, num_hidden_layers=n, layer_types=(["linear_attention","linear_attention","full_attention"]*n)[:n])
    t=time.time(); g=export(model,target); t=time.time()-t
    from collections import Counter
    print(fam,target,n,"seconds",round(t,1),"nodes",len(list(g.graph.all_nodes())), g.opset_imports)
    print(Counter(x.op_type for x in g.graph.all_nodes()).most_common(40))
    onnx_ir.save(g,f"/tmp/hyb_{fam}_{target}_{n}.onnx")

"""Every family of causal LMs that transformers knows -> whether it can be wrapped, shown on a tiny model of it.

Nothing here decides anything: a row says what `wrap` did. What wrapping a model does not show, `REMARKS` adds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cdsurgery.anatomy import layer_types
from cdsurgery.errors import InvalidInputError, UnsupportedModelError
from cdsurgery.wrap import wrap
from cdsurgery.zoo import tiny_model

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_LINES = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers"
_TIES = (
    "cached steps may differ from a full forward, in the plain model too: where the indexer has few heads its ReLU "
    "scores many keys exactly 0, and which of equal keys top-k takes depends on how many there are "
    f"{_LINES}/models/"
)
_CLAMP = (
    "cached steps drift from a full forward by some 1e-4 of the largest logit, in the plain model too: a single step "
    f"does not clamp dt to `time_step_min` {_LINES}/models/"
)
_NOTE = "dots3_note/modeling_dots3_note.py#L262"

# model type -> what to know about it; tests/test_families.py shows each remark about cached steps.
REMARKS: dict[str, str] = {
    "axk2": f"{_TIES}axk2/modeling_axk2.py#L264",
    "bamba": "without an attention layer plain transformers cannot generate: only those tell a cache its length "
    f"{_LINES}/cache_utils.py#L1719-L1726",
    "blt": "its last layers start from bytes and, across, from patches of another model "
    f"{_LINES}/models/blt/modeling_blt.py#L731",
    "cpmant": f"attends in both directions {_LINES}/models/cpmant/modeling_cpmant.py#L560-L562",
    "deepseek_v32": f"{_TIES}deepseek_v32/modeling_deepseek_v32.py#L228",
    "deepseek_v4": f"{_TIES}deepseek_v4/modeling_deepseek_v4.py#L468",
    "dots3_note": f"{_TIES}{_NOTE}",
    "dots3_note_text": f"{_TIES}{_NOTE}",
    "gemma4_assistant": "a drafter: it reads the states and the cache of the model it drafts for",
    "gemma4_unified_assistant": "a drafter: it reads the states and the cache of the model it drafts for",
    "glm_moe_dsa": f"{_TIES}glm_moe_dsa/modeling_glm_moe_dsa.py#L229",
    "hrm_text": f"two stacks that take turns, many times {_LINES}/models/hrm_text/modeling_hrm_text.py#L489",
    "hy_v4": f"{_TIES}hy_v4/modeling_hy_v4.py#L240",
    "inkling2_text": "what leaves its last layer is mixed with the states of earlier ones "
    f"{_LINES}/models/inkling2/modeling_inkling2.py#L1311",
    "mllama": "layers that attend to an image are left out: without one they do not run "
    f"{_LINES}/models/mllama/modeling_mllama.py#L1128",
    "moshi": "beyond its window cached steps differ from a full forward, in the plain model too: the cache keeps a "
    f"window of which the mask knows nothing {_LINES}/models/moshi/modeling_moshi.py#L700",
    "nemotron_h": f"{_CLAMP}nemotron_h/modeling_nemotron_h.py#L230-L231",
    "reformer": f"reversible: two streams, put together at the end {_LINES}/models/reformer/modeling_reformer.py#L1790",
    "rwkv": "cached steps are right for one row at a time only, in the plain model too: a single step mixes the rows "
    f"of a batch {_LINES}/models/rwkv/modeling_rwkv.py#L250-L251",
    "xlm": f"attends in both directions unless config.causal {_LINES}/models/xlm/modeling_xlm.py#L795",
    "xlnet": "predicts in any order: each position attends in both directions unless it is given a permutation "
    f"{_LINES}/models/xlnet/modeling_xlnet.py#L1066-L1070",
    "zamba2": f"{_CLAMP}zamba2/modeling_zamba2.py#L485-L486",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: transformers' name of it.
        model_class: the causal LM that it maps to.
        tail: from the last layer to the logits; "" where none is proven.
        layers: how many of each kind the tiny model has, such as "4 sliding_attention, 2 full_attention".
        proven: whether `wrap` proved it.
        note: why not, or the lines of the model that transforms in its tail repeat; then the remark about it.
    """

    model_type: str
    model_class: str
    tail: str
    layers: str
    proven: bool
    note: str

    @property
    def verdict(self) -> str:
        """In one word."""
        return "proven" if self.proven else "refused"


def examine(model_type: str) -> Family:
    """Wrap a tiny model of the family, or be refused; about a second.

    Raises:
        InvalidInputError: transformers has no causal LM of that name.
    """
    if model_type not in FAMILIES:
        raise InvalidInputError(
            f"transformers {transformers.__version__} has no causal LM of the family {model_type!r}. Its families are "
            "the model types of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, such as 'llama'; cdsurgery families prints them all."
        )
    model = tiny_model(model_type)
    name, remark = type(model).__name__, REMARKS.get(model_type, "")
    try:
        anatomy = wrap(model).anatomy
    except UnsupportedModelError as error:
        reason = str(error).partition(". Declared")[0].partition(". Confident decoding needs")[0]
        reason = re.sub(r" \(largest difference .*?\)", "", reason)  # its last digits are another machine's
        return Family(model_type, name, "", "", proven=False, note="; ".join(filter(None, [reason, remark])))
    kinds = Counter(layer_types(model, anatomy))
    lines = [f"({row.name}): `{row.option}` {row.source}" for row in anatomy.transforms]
    return Family(
        model_type,
        name,
        tail=str(anatomy),
        layers=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        proven=True,
        note="; ".join(filter(None, [*lines, remark])),
    )


def markdown(families: Sequence[Family]) -> str:
    """docs/families.md."""
    proven = sum(family.proven for family in families)
    rows = [
        f"| {family.model_type} | {_code(family.tail)} | {family.layers} | {family.verdict} | {_linked(family.note)} |"
        for family in families
    ]
    return "\n".join([_HEAD.format(transformers.__version__, len(families), proven, len(families) - proven), *rows, ""])


_HEAD = """\
# Families

What `cdsurgery.wrap` does with every causal LM that transformers {} knows: of {} families, {} are proven and {}
refused. Written by `make families`, which wraps a tiny random model of each; `cdsurgery families` prints the same.
After a new release of transformers, install it and run that again. Tests hold this page against what the models do,
and for each family that is proven: final logits, the logits of every candidate layer, entropies, selected layers,
`logits_to_keep`, cached steps and `unwrap` (`tests/test_families.py`).

The tail is what stands between the last decoder layer and the logits: modules by their path, and in parentheses what
the model does without one, each with the line that it repeats. Layers are those of the tiny model.

| family | tail | layers | verdict | note |
|---|---|---|---|---|"""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _linked(text: str) -> str:
    """The note in a table's cell: addresses as links, bars escaped."""
    return re.sub(r"(https://\S+[\w/])", r"([line](\1))", text.replace("|", "\\|"))

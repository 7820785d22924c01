"""A decoder that is an ONNX file already -> an artifact with the confident head in it; no PyTorch weights needed.

    export.graft("their/model.onnx", "artifact/", lookback=10)

1. Read: the file, its contract and the configuration beside it (`source`, `contract`, `companions`).
2. Find: from `logits` backwards the unembedding and the final norm (`tail`), then the residual stream (`residual`),
   by what follows from what (`flow`). All that is known of the file is a `decoder.ForeignDecoder`.
3. Join: the confident head over x^(L) .. x^(L-K), which projects with copies of the tail (`head`).
4. Prove: old and new graph run on the same inputs (`proof`). What cannot be proven is refused, and nothing is left.

The graphs of optimum, of onnxruntime-genai's builder (int4 included) and of transformers' exporter are tested.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir

from cdsurgery.config import DEFAULT_LOOKBACK, ConfidentConfig
from cdsurgery.errors import InvalidInputError
from cdsurgery.export.artifact.clients import GRAPH_FILE
from cdsurgery.export.artifact.manifest import Manifest, describe_files
from cdsurgery.export.artifact.staging import staged_folder
from cdsurgery.export.graft.companions import check_companions, write_companions
from cdsurgery.export.graft.decoder import ForeignDecoder
from cdsurgery.export.graft.proof import Runs, open_session, prove
from cdsurgery.export.options import Positions

__all__ = ["graft"]


def graft(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    lookback: int | float = DEFAULT_LOOKBACK,
    probability: float = 1.0,
    seed: int | None = None,
    measure: str = "entropy",
    positions: Positions = "last",
) -> Path:
    """Give an exported decoder a confident head.

    Args:
        model: an ONNX file with `input_ids`, `attention_mask`, a cache and `logits`; its `config.json` or
            `genai_config.json` lies beside it.
        folder: the artifact to make; it must not exist.
        lookback, probability, seed, measure: as in `cdsurgery.wrap`.
        positions: "last" returns logits `[B, 1, V]` of each row's last real token; "all" `[B, S, V]`, of every new one.

    Returns:
        The folder. Inputs and cache have the names they had; `logits` are now those of the selected layer.

    Raises:
        InvalidInputError: an option is out of range, the file is not an ONNX model, or it has no configuration.
        UnsupportedModelError: the residual stream, the final norm or the head cannot be found, or cannot be proven.
        ArtifactError: the folder exists, or weights are missing, truncated or outside of the file's folder.
    """
    if positions not in ("last", "all"):
        raise InvalidInputError(f"positions is {positions!r}; it must be 'last' or 'all'.")
    options = ConfidentConfig(lookback, probability, seed, measure, scan="full")
    if options.probability == 0:
        raise InvalidInputError(
            "probability is 0, which is ordinary decoding: there is nothing to graft. Use a probability above 0."
        )
    path = Path(model)
    with staged_folder(folder) as aside:
        check_companions(path)
        theirs = ForeignDecoder(path)
        config = options.resolve(theirs.facts.layers)
        manifest = theirs.manifest(config, positions)
        runs = Runs(manifest, theirs.contract.vocabulary, theirs.cache_capacity)
        old = runs(open_session(path))
        shortened = {}
        for k in sorted({1, int(manifest.confident.lookback)}):
            other = ForeignDecoder(path)
            other.leave_out_last_(k)
            shortened[k] = runs(open_session(other.model, path.parent))
        theirs.operate_(config, manifest)
        onnx_ir.save(theirs.model, aside / GRAPH_FILE, external_data=f"{GRAPH_FILE}.data")
        proof = prove(manifest, old, runs(open_session(aside / GRAPH_FILE)), shortened)
        write_companions(path, aside, theirs.config)
        Manifest(**(vars(manifest) | {"files": describe_files(aside), "parity": proof})).write(aside)
    return Path(folder)

"""A session: the values of a plain ONNX Runtime run, no copy of the cache, and the providers asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from artifacts import Client, artifact, padded, wrapped
from families import token_ids
from torch import Tensor

from cdsurgery import ArtifactError, InvalidInputError, export
from cdsurgery.export import OnnxRunner
from cdsurgery.export.runtime.session import Session

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return export.load(artifact("llama"))


def feed(batch: int, past: int, length: int, **changes: Any) -> dict[str, Tensor]:
    """A left-padded feed for the llama artifact, with a cache of random numbers."""
    mask = padded(batch, past + length, "left")
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "input_ids": token_ids(batch, length),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:],
    }
    for layer in range(4):
        for part in ("key", "value"):
            tensors[f"past_key_values.{layer}.{part}"] = torch.randn(batch, 2, past, 16, generator=generator)
    return tensors | changes


@pytest.mark.parametrize(("batch", "past", "length"), [(1, 0, 1), (2, 0, 7), (3, 5, 1), (2, 9, 4)])
def test_bound_tensors_give_bit_for_bit_what_a_plain_run_gives(
    runner: OnnxRunner, batch: int, past: int, length: int
) -> None:
    tensors = feed(batch, past, length)
    found = runner.session.run(tensors)
    client = Client(artifact("llama"))
    truth = client.session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
    assert list(found) == client.outputs
    for name, value in zip(client.outputs, truth, strict=True):
        assert torch.equal(found[name], torch.from_numpy(value)), name


class Addresses:
    """The address of every tensor that a session binds, run by run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[dict[str, int], dict[str, int]]] = []
        bind = {side: getattr(onnxruntime.IOBinding, f"bind_{side}") for side in ("input", "output")}
        begin = onnxruntime.InferenceSession.io_binding

        def io_binding(session: Any) -> Any:
            self.runs.append(({}, {}))
            return begin(session)

        def spy(side: int, name: str) -> Any:
            def bound(binding: Any, tensor: str, *rest: Any) -> None:
                self.runs[-1][side][tensor] = rest[-1]
                bind[name](binding, tensor, *rest)

            return bound

        patch.setattr(onnxruntime.InferenceSession, "io_binding", io_binding)
        patch.setattr(onnxruntime.IOBinding, "bind_input", spy(0, "input"))
        patch.setattr(onnxruntime.IOBinding, "bind_output", spy(1, "output"))

    def assert_the_cache_was_handed_on(self) -> None:
        """What each run wrote as present, the next one read as past, from the same address."""
        assert len(self.runs) > 1
        for (_, written), (read, _) in zip(self.runs, self.runs[1:], strict=False):
            past = {name: address for name, address in read.items() if name.startswith("past_key_values.")}
            assert len(past) == 8
            assert past == {name: written[name.replace("past_key_values", "present")] for name in past}


def test_generate_reads_each_cache_where_the_run_before_wrote_it(
    runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = Addresses(monkeypatch)
    runner.generate(token_ids(2, 5), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(addresses.runs) == 6
    addresses.assert_the_cache_was_handed_on()


def test_a_returned_cache_is_the_memory_that_onnx_runtime_wrote(
    runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = Addresses(monkeypatch)
    cache = runner(token_ids(2, 5)).past_key_values
    ((_, written),) = addresses.runs
    assert [layer.keys.data_ptr() for layer in cache.layers] == [written[f"present.{n}.key"] for n in range(4)]
    assert [layer.values.data_ptr() for layer in cache.layers] == [written[f"present.{n}.value"] for n in range(4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int32)}, r"input_ids has .* torch\.int32; .* torch\.int64"),
        (
            {"input_ids": torch.ones(3, dtype=torch.int64)},
            r"input_ids has shape \[3\] .*must be \[3, 3\], \[batch, seq",
        ),
        (
            {"attention_mask": torch.ones(2, 6, dtype=torch.int64)},
            r"shape \[2, 6\] .*must be \[2, 7\], \[batch, total\]",
        ),
        ({"position_ids": torch.ones(1, 3, dtype=torch.int64)}, r"position_ids has shape \[1, 3\] .* \[2, 3\]"),
        ({"past_key_values.2.key": torch.zeros(2, 2, 5, 16)}, r"past_key_values\.2\.key has shape .* \[2, 2, 4, 16\]"),
        ({"past_key_values.2.value": torch.zeros(2, 3, 4, 16)}, r"\[2, 3, 4, 16\] .* \[2, 2, 4, 16\]"),
        ({"past_key_values.0.key": torch.zeros(1, 2, 4, 16)}, r"\[1, 2, 4, 16\] .* \[2, 2, 4, 16\]"),
        ({"past_key_values.3.key": torch.zeros(2, 2, 4, 8)}, r"\[2, 2, 4, 8\] .* \[2, 2, 4, 16\]"),
        ({"past_key_values.1.key": torch.zeros(2, 2, 4, 16).half()}, r"torch\.float16; .* torch\.float32"),
        ({"past_key_values.4.key": torch.zeros(2, 2, 4, 16)}, r"unknown inputs: past_key_values\.4\.key\. The graph"),
        ({"token_type_ids": torch.zeros(2, 3)}, "unknown inputs: token_type_ids"),
    ],
)
def test_a_feed_that_does_not_fit_is_said_before_onnx_runtime_sees_it(
    runner: OnnxRunner, changes: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        runner.session.run(feed(2, 4, 3, **changes))


def test_a_missing_input_is_named(runner: OnnxRunner) -> None:
    tensors = feed(2, 4, 3)
    del tensors["position_ids"]
    with pytest.raises(InvalidInputError, match="Missing or unknown inputs: position_ids"):
        runner.session.run(tensors)


def test_a_provider_may_come_with_options_which_onnx_runtime_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    open_session = onnxruntime.InferenceSession

    def spy(*arguments: Any, **options: Any) -> Any:
        given.append(options["providers"])
        return open_session(*arguments, **options)

    ids = token_ids(1, 5)
    plain = export.load(artifact("llama"))(ids).logits
    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    runner = export.load(artifact("llama"), providers=[("CPUExecutionProvider", {"use_arena": 0})])
    assert given == [[("CPUExecutionProvider", {"use_arena": 0})]]
    assert torch.equal(runner(ids).logits, plain)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        (["NoSuchProvider"], r"has no NoSuchProvider here; it has .*CPUExecutionProvider"),
        ([("NoSuchProvider", {})], r"has no NoSuchProvider here; it has .*CPUExecutionProvider"),
        ("CPUExecutionProvider", "must be a list of names"),
        ([], "must be a list of names"),
        ([("CPUExecutionProvider",)], r"\(name, options\) pairs"),
        ([7], r"\(name, options\) pairs"),
    ],
)
def test_providers_that_cannot_be_had_are_answered_with_those_that_can(providers: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export.load(artifact("llama"), providers=providers)


def test_a_cuda_provider_beside_a_pytorch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInputError, match=r"CUDAExecutionProvider keeps the cache .* sees none"):
        export.load(artifact("llama"), providers=[CUDA])


def test_a_provider_that_onnx_runtime_leaves_out_is_an_error_and_not_a_slow_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "MIGraphXExecutionProvider"  # known to ONNX Runtime, not built in here: it warns and takes the CPU
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, "CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning, match=name),
        pytest.raises(InvalidInputError, match=f"could not start {name} and would run on CPUExecutionProvider"),
    ):
        export.load(artifact("llama"), providers=[name])


def test_a_file_that_is_no_graph_is_refused(tmp_path: Any, runner: OnnxRunner) -> None:
    for content, message in ((b"no protobuf \xff", "is not an ONNX file"), (b"", "ONNX Runtime cannot open")):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            Session(tmp_path / "model.onnx", runner.manifest.signature)


def test_a_graph_for_another_provider_is_refused_with_the_way_out(tmp_path: Path, runner: OnnxRunner) -> None:
    """ONNX Runtime's CPU has no kernels for bfloat16."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (bfloat16[1] x) => (bfloat16[1] y) {y = Mul(x, x)}'
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match=r"with CPUExecutionProvider: .*Mul.* name them in providers="):
        Session(tmp_path / "model.onnx", runner.manifest.signature)


@pytest.mark.gpu
@pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
    reason="needs a CUDA device, onnxruntime-gpu and a PyTorch with CUDA",
)
@pytest.mark.parametrize("ids_on", ["cpu", "cuda"])
def test_on_a_gpu_the_cache_stays_there_and_the_tokens_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, ids_on: str
) -> None:
    # TF32 would round every product to ten bits.
    runner = export.load(artifact("llama"), providers=[(CUDA, {"device_id": 0, "use_tf32": 0})])
    addresses = Addresses(monkeypatch)
    ids = token_ids(2, 5).to(ids_on)
    out = runner(ids)
    assert out.logits.device == ids.device
    assert {tensor.device.type for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)} == {
        "cuda"
    }
    more = runner(ids[:, :1], past_key_values=out.past_key_values)
    addresses.assert_the_cache_was_handed_on()
    truth = wrapped("llama")(torch.cat([token_ids(2, 5), token_ids(2, 5)[:, :1]], dim=1), logits_to_keep=1)
    assert torch.allclose(more.logits.cpu(), truth.logits, rtol=0, atol=1e-3)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found = runner.generate(ids.to(runner.device), max_new_tokens=12, **options).cpu()
        assert torch.equal(found, wrapped("llama").generate(token_ids(2, 5), max_new_tokens=12, **options))

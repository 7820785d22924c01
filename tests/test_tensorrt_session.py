"""`EngineSession` on a TensorRT that needs no GPU (`fake_tensorrt`): memory, profiles, captured steps, caches."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import artifact, wrapped
from engines import engine, needs_rtx
from fake_tensorrt import Context, FakeTensorRT, Graph, install
from families import token_ids

from cdsurgery import ArtifactError, InvalidInputError, export
from cdsurgery.export.tensorrt import session, steps
from cdsurgery.export.tensorrt.manifest import read_engine_manifest

pytestmark = needs_rtx


def installed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeTensorRT:
    return install(monkeypatch, engine("llama"), artifact("llama"), **options)


def built_with(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Have the engine's manifest say so."""
    manifest = replace(read_engine_manifest(engine("llama")), flags=flags)
    monkeypatch.setattr(session, "read_engine_manifest", lambda folder: manifest)


@pytest.fixture
def lean_runtime(tmp_path: Path) -> Path:
    """The library of an earlier TensorRT."""
    library = tmp_path / "libnvinfer_lean.so.1"
    library.touch()
    return library


@pytest.mark.parametrize(
    ("compiles", "graphs"),
    [(False, False), (False, True), (True, False)],
    ids=["tensorrt", "tensorrt, captured", "tensorrt_rtx"],
)
def test_generate_gives_the_tokens_of_pytorch(monkeypatch: pytest.MonkeyPatch, graphs: bool, compiles: bool) -> None:
    fake = installed(monkeypatch, compiles=compiles)
    runner = export.load(engine("llama"), cuda_graphs=graphs)
    ids = token_ids(2, 5)
    for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 2}):
        for rows in (ids, ids[1:]):  # one row: what is cut out of it is contiguous, and begins anywhere
            truth = wrapped("llama").generate(rows, max_new_tokens=9, do_sample=False, **options)
            for _ in range(2):  # captured, then replayed
                assert torch.equal(runner.generate(rows, max_new_tokens=9, do_sample=False, **options), truth)
    assert (Graph.replays > 0) == graphs
    assert runner.runtime == "tensorrt"
    assert len(fake.contexts) == 2 + (len(runner.session._steps._graphs) if graphs else 0)
    assert len(fake.alive) == len(fake.contexts)
    gc.collect()
    gc.disable()  # an engine gives its memory back at once, and not when Python next looks for cycles
    del runner
    gc.enable()
    assert not fake.alive


def test_a_graph_takes_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    monkeypatch.setattr(steps, "GRAPHS", 3)
    runner = export.load(engine("llama"), cuda_graphs=True)
    truth = wrapped("llama").generate(token_ids(1, 3), max_new_tokens=9, do_sample=False)
    for _ in range(2):
        assert torch.equal(runner.generate(token_ids(1, 3), max_new_tokens=9, do_sample=False), truth)
    assert list(runner.session._steps._graphs) == [(1, 8), (1, 9), (1, 10)]


def test_steps_that_follow_each_other_copy_nothing_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    runner = export.load(engine("llama"), cuda_graphs=True)
    bound, copy_, counts = steps.DecodeSteps.bound, torch.Tensor.copy_, []

    def noted(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        counts[-1] += tensor.ndim == 4  # keys and values
        return copy_(tensor, source)

    def watched(*arguments: Any) -> Any:
        counts.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", noted)
            return bound(*arguments)

    monkeypatch.setattr(steps.DecodeSteps, "bound", watched)
    past = runner(token_ids(1, 3)).past_key_values
    for _ in range(3):
        past = runner(token_ids(1, 1), past_key_values=past).past_key_values
    assert counts == [len(runner.manifest.signature.past), 0, 0]  # the first step takes the prompt's over


def test_a_cache_that_another_text_has_overwritten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    runner = export.load(engine("llama"), cuda_graphs=True)
    ids = token_ids(2, 5)
    first, second = (runner(row[None, :1], past_key_values=runner(row[None]).past_key_values) for row in ids)
    with pytest.raises(InvalidInputError, match="of an earlier step"):  # of the same batch and the same length
        runner(ids[:1, :1], past_key_values=first.past_key_values)
    with pytest.raises(InvalidInputError, match="of an earlier step"):  # two tokens, which no captured step takes
        runner(ids[:1, :2], past_key_values=first.past_key_values)
    truth = wrapped("llama")(torch.cat([ids[1:], ids[1:, :1], ids[:1, :2]], dim=1)).logits[:, -1:]
    found = runner(ids[:1, :2], past_key_values=second.past_key_values).logits
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


def test_a_step_that_cannot_be_captured_says_so_and_leaves_no_broken_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = installed(monkeypatch)
    fake.capturable = False
    runner = export.load(engine("llama"), cuda_graphs=True)
    past = runner(token_ids(1, 3)).past_key_values
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"cannot be captured as a CUDA graph.* Load it without cuda_graphs"):
            runner(token_ids(1, 1), past_key_values=past)
    assert not fake.capturing


def two_caches() -> int:
    """Bytes: keys and values of 4 rows of 95 + 32 tokens in float32, twice."""
    config = wrapped("llama").config
    return 2 * 4 * (95 + 32) * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(
    ("flags", "free", "budget"),
    [
        ((), 0, 5000),
        (("WEIGHT_STREAMING",), 1 << 40, 5000),
        (("WEIGHT_STREAMING",), 1500 + 3000, 3000),  # 1500 for what is computed and for a weight on its way
        (("WEIGHT_STREAMING",), -1, 0),
    ],
    ids=["none stream", "all fit", "some fit", "none fits"],
)
def test_streamed_weights_leave_room_for_a_run_and_are_settled_before_contexts_are_made(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], free: int, budget: int, cuda_graphs: bool
) -> None:
    fake = installed(monkeypatch)
    # Captured steps hold two for good, beside those that a prompt reads and writes.
    free += session.SPARE + two_caches() * (2 if cuda_graphs else 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 50))
    budgets: list[int] = []
    make = fake.engine.create_execution_context

    def noted(config: Any) -> Any:
        budgets.append(fake.engine.weight_streaming_budget_v2)
        return make(config)

    monkeypatch.setattr(fake.engine, "create_execution_context", noted)
    built_with(monkeypatch, *flags)
    export.load(engine("llama"), cuda_graphs=cuda_graphs)
    assert budgets == [budget] * 2


def test_contexts_of_tensorrt_rtx_compute_each_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = installed(monkeypatch, compiles=True)
    free = 2 * 1500 + 3000 + session.SPARE + two_caches()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 50))
    built_with(monkeypatch, "WEIGHT_STREAMING")
    export.load(engine("llama"))
    assert fake.engine.weight_streaming_budget_v2 == 3000


def test_a_budget_that_is_refused_in_silence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = installed(monkeypatch)
    fake.engine.accepts = False
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    built_with(monkeypatch, "WEIGHT_STREAMING")
    with pytest.raises(ArtifactError, match="refuses to keep 0 bytes of its weights"):
        export.load(engine("llama"))


def test_an_engine_of_an_earlier_tensorrt_runs_in_its_lean_runtime(
    monkeypatch: pytest.MonkeyPatch, lean_runtime: Path
) -> None:
    fake = installed(monkeypatch)
    built_with(monkeypatch, "VERSION_COMPATIBLE")
    fake.__version__ = "99.0"
    export.load(engine("llama"), lean_runtime=lean_runtime)
    assert fake.lean_runtimes == [str(lean_runtime)]
    with pytest.raises(InvalidInputError, match="lean_runtime are for engines"):
        export.load(artifact("llama"), lean_runtime=lean_runtime)


@pytest.mark.parametrize(
    ("compiles", "graphs"),
    [(False, False), (False, True), (True, False)],
    ids=["tensorrt", "tensorrt, captured", "tensorrt_rtx"],
)
def test_what_was_made_goes_before_what_made_it(
    monkeypatch: pytest.MonkeyPatch, lean_runtime: Path, compiles: bool, graphs: bool
) -> None:
    fake = installed(monkeypatch, compiles=compiles)
    built_with(monkeypatch, "VERSION_COMPATIBLE")
    fake.__version__ = "99.0"
    runner = export.load(engine("llama"), lean_runtime=lean_runtime, cuda_graphs=graphs)
    runner.generate(token_ids(1, 3), max_new_tokens=3, do_sample=False)
    assert fake.gone == []
    del runner
    gc.collect()
    makers = (["config"] * 2 if compiles else []) + ["engine", "lean runtime", "runtime", "log"]
    assert [kind for kind in fake.gone if kind != "context"] == makers
    assert fake.gone.index(makers[0]) == len(fake.contexts) >= 2  # all of which went before


def test_what_tensorrt_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    runner = export.load(engine("llama"))
    prefill = runner.session._contexts[0]
    for name, message in (
        ("set_input_shape", "refuses input_ids of shape"),
        ("set_tensor_address", "refuses the memory of input_ids"),
        ("execute_async_v3", "did not run"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(prefill, name, lambda *_: False, raising=False)
            with pytest.raises(ArtifactError, match=message):
                runner(token_ids(1, 3))


def test_a_context_that_takes_no_profile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    monkeypatch.setattr(Context, "set_optimization_profile_async", lambda *_: False)
    with pytest.raises(ArtifactError, match="cannot be made ready to run"):
        export.load(engine("llama"))


def test_a_runtime_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = installed(monkeypatch)

    def nothing(log: Any) -> Any:
        log.log(fake.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", nothing, raising=False)
    with pytest.raises(ArtifactError, match=r"cannot start its runtime(.|\n)*failure with error: 35"):
        export.load(engine("llama"))


def test_compiled_kernels_are_kept_without_being_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = installed(monkeypatch, compiles=True)
    for earlier in ([], [b"kernels"]):
        runner = export.load(engine("llama"), cache=tmp_path / "kept")
        assert fake.kernels.found == earlier
        assert all(context.config.cache is fake.kernels for context in fake.alive)
        del runner
        gc.collect()
        assert [file.read_bytes() for file in (tmp_path / "kept").iterdir()] == [b"kernels"]
    with pytest.raises(InvalidInputError, match=r"captures by itself .* Load it without cuda_graphs"):
        export.load(engine("llama"), cuda_graphs=True)
    installed(monkeypatch)
    with pytest.raises(InvalidInputError, match="compiles nothing here: no cache"):
        export.load(engine("llama"), cache=tmp_path)


def test_verify_runs_what_the_profiles_take(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)  # an engine of 4 rows and 32 new tokens; verify has texts of 33, and six of them
    report = export.verify(engine("llama"), wrapped("llama"))
    assert report.passed, str(report)
    assert report.texts == 6


def test_profiles_that_take_no_text_are_named_and_not_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    runner: Any = export.load(engine("llama"))
    runner.session.manifest = replace(runner.session.manifest, profiles=())
    with pytest.raises(InvalidInputError, match=r"The profiles of the engine in .* take no text of one token and two"):
        export.verify(runner, wrapped("llama"))

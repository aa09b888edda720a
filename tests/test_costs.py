"""
What cannot be noisy: how many passes, vectors and buffers a step and an estimate take. Seconds are for scripts/benchmark.py.
"""

import contextlib
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from estimate_helpers import NUM_TASKS, consolidated, flat, num_parameters, relative
from safetensors.torch import load_file
from script_helpers import arguments, finished_run, interrupted_copy, read_log, run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_cl import DiagonalEWC, Rank1EWC, memory
from diffusers_cl.fisher import diagonal_fisher, rank1_fisher
from diffusers_cl.quadratic import BLOCK_SIZE, Rank1Terms
from diffusers_cl.record import RunRecord
from diffusers_cl.report import read_json


WITH_BOTH = {"penalty": "rank1_ewc", "penalty_mode": "loss", "replay": "generative_distillation"}
# Of the weights: Adam makes whole steps of the rounding of gradients that are nearly 0.
MAX_ROUNDING = 2e-2
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def passes(monkeypatch) -> Counter:
    """Counts, by the run's phase, forward passes of networks that keep what a backward pass needs, others, and backward passes."""
    counter, phases = Counter(), ["outside"]
    forward, backward, phase = UNet2DModel.forward, torch.autograd.backward, RunRecord.phase

    def counted_forward(self, *args, **kwargs):
        counter[phases[-1], "forward" if torch.is_grad_enabled() else "forward alone"] += 1
        return forward(self, *args, **kwargs)

    def counted_backward(*args, **kwargs):
        counter[phases[-1], "backward"] += 1
        return backward(*args, **kwargs)

    @contextlib.contextmanager
    def noted_phase(self, name):
        phases.append(name)
        with phase(self, name):
            yield
        phases.pop()

    monkeypatch.setattr(UNet2DModel, "forward", counted_forward)
    monkeypatch.setattr(torch.autograd, "backward", counted_backward)
    monkeypatch.setattr(RunRecord, "phase", noted_phase)
    return counter


def test_passes_of_a_run(files, tmp_path, passes):
    # Two tasks of five steps, their Fishers in one batch each; the second task replays.
    settings = {"penalty": "rank1_ewc", "penalty_mode": "loss", "ewc_lambda": "1.0", "fisher_diagnostics": "false"}
    settings |= {"replay": "generative_distillation", "fisher_samples": "8", "fisher_batch_size": "8"}
    assert run(arguments(files, tmp_path, **settings)) == 0
    training = {kind: count for (phase, kind), count in passes.items() if phase == "train"}
    # One pass of the student over new and replayed rows together, one of the teacher.
    assert training == {"forward": 10, "backward": 10, "forward alone": 5}
    # The mean gradient, and two passes for the second moment; autograd.grad is no `backward`.
    assert passes["fisher", "forward"] == 2 and passes["fisher", "forward alone"] == 4
    assert passes["replay", "forward"] == passes["evaluate", "forward"] == 0


def test_passes_of_an_estimate(tiny_unet, make_batches, losses, passes):
    batches = make_batches([4, 4, 4])

    def counted(estimate, **options) -> tuple[int, int]:
        passes.clear()
        estimate(tiny_unet, losses, batches, **options)
        return passes["outside", "forward"], passes["outside", "forward alone"]

    assert counted(rank1_fisher, diagnostics=False, curvature=False) == (3, 6)
    assert counted(rank1_fisher, diagnostics=False) == (3, 18)
    # A pass a chunk, for all its rows.
    assert counted(diagonal_fisher) == (3, 0)
    assert counted(diagonal_fisher, chunk_size=2) == (6, 0)


@pytest.mark.parametrize(("kind", "vectors"), [(Rank1EWC, NUM_TASKS), (DiagonalEWC, 2)])
def test_vectors_that_are_kept(tasks, losses, kind, vectors):
    penalty = consolidated(kind, 1.0, tasks, losses)
    size = num_parameters(tasks[0][0])
    state = {key: tensor for key, tensor in penalty.state_dict().items() if not key.startswith("statistics.")}
    assert sum(tensor.numel() for tensor in state.values()) == vectors * size
    # Joining the directions holds none twice, before the next use and after it.
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in vectors_of(penalty)}
    assert sum(held.values()) == 4 * vectors * size
    penalty(tasks[0][0])
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in vectors_of(penalty)}
    assert sum(held.values()) == 4 * vectors * size
    if kind is Rank1EWC:
        anchors = [tensor for model, _ in tasks for tensor in model.parameters() if tensor.numel() > NUM_TASKS]
        assert not any(
            torch.equal(row, a) for a in anchors for t in state.values() for row in t if row.shape == a.shape
        )


def vectors_of(penalty):
    joined = getattr(penalty, "_joined", None)
    matrices = [] if joined is None else joined.matrices
    return [tensor for tensors in penalty.tensors.values() for tensor in tensors.values()] + matrices


class Allocations(TorchDispatchMode):
    """Counts the numbers in tensors that are made while it is on; `peak` is the most that were there at one time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(t)
        }
        result = function(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes() // 4
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
@pytest.mark.parametrize("kind", [Rank1EWC, DiagonalEWC])
def test_buffers_of_a_step(tiny_unet, make_batches, losses, kind, mode):
    penalty = kind(1.0)
    for seed in range(4):
        penalty.consolidate(tiny_unet, losses, make_batches([4], seed=seed), diagnostics=False)
    for parameter in tiny_unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # What is computed once for a task is there.
    penalty.step(tiny_unet, 0.1)
    with Allocations() as allocations:
        if mode == "loss":
            penalty(tiny_unet).backward()
        else:
            penalty.step(tiny_unet, 0.1)
    size = num_parameters(tiny_unet)
    largest = max(parameter.numel() for parameter in tiny_unet.parameters())
    if kind is DiagonalEWC:
        # One parameter at a time, in the decoupled mode in float64.
        assert size <= allocations.peak < size + 6 * largest
    else:
        # The penalty's part of the gradient; beside it, before that, one block of weights. This network is one block.
        assert size < BLOCK_SIZE
        assert size <= allocations.peak < 1.1 * size


def test_the_count_of_buffers_sees_what_it_should():
    x = torch.ones(1000)
    with Allocations() as allocations:
        a = x + 1
        b = a[:10]
        x.add_(b.sum())
        del a, b
        c = x * 2
        c = c * 2
    assert 2000 <= allocations.peak < 2100 and len(c) == 1000


# Precision


def test_residuals_of_thirty_million_parameters_in_float32():
    # As METHOD has it: float32 products, float64 between blocks and for b. The weights are as large as a network's.
    generator = torch.Generator().manual_seed(0)
    sizes, num_tasks = [12_000_000, 9_000_000, 5_000_000, 3_500_000, 400_000, 99_000, 1000], 20
    weights = [torch.empty(n).uniform_(-0.05, 0.05, generator=generator) for n in sizes]
    row = [torch.empty(n).uniform_(-1, 1, generator=generator) for n in sizes]
    # Drawing all of them would take most of the time.
    directions = {str(i): torch.stack([part.roll(k) for k in range(num_tasks)]) for i, part in enumerate(row)}
    norm = (sum(sizes) / 3) ** 0.5
    for rows in directions.values():
        rows /= norm
    expected = torch.zeros(num_tasks, dtype=torch.float64)
    for rows, part in zip(directions.values(), weights, strict=True):
        expected += torch.stack([row.double() @ part.double() for row in rows])
    found = Rank1Terms(directions, [1.0] * num_tasks, [0.0] * num_tasks).residuals(weights)
    # |theta| is 158: 1e-8 of it was seen, and a step moves the weights along v by 1e-3 or so.
    length = sum(part.square().sum().item() for part in weights) ** 0.5
    assert (found - expected).abs().max() < 1e-7 * length


# Where images are kept


def test_images_that_do_not_fit_are_streamed_to_the_same_bits(files, tmp_path, monkeypatch):
    settings = {"replay": "generative_distillation", "random_flip": "true", "dataloader_num_workers": "2"}
    assert run(arguments(files, tmp_path / "kept", **settings)) == 0
    monkeypatch.setattr(memory, "SHARE_OF_FREE_MEMORY", 0.0)
    assert run(arguments(files, tmp_path / "streamed", **settings)) == 0
    metrics = [read_json(tmp_path / name / "metrics.json")["metrics"] for name in ("kept", "streamed")]
    assert metrics[0] == metrics[1]
    kept, streamed = (load_file(tmp_path / name / "task-01" / UNET) for name in ("kept", "streamed"))
    assert all(torch.equal(kept[name], streamed[name]) for name in kept)


def test_where_images_are_kept(monkeypatch):
    free = {"cuda": 1000, "cpu": 4000}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[torch.device(device).type])
    places = [memory.place_for(num_bytes, "cuda") for num_bytes in (250, 251, 1000, 1001)]
    assert places == [torch.device("cuda"), torch.device("cpu"), torch.device("cpu"), None]
    assert memory.place_for(251, "cpu") == torch.device("cpu") and memory.place_for(1001, "cpu") is None


# Options


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after a run with penalty and distillation, without options."""
    return load_file(finished_run(tmp_path_factory, "with_both", **WITH_BOTH) / "task-01" / UNET)


def test_a_network_compiled_by_the_launcher_leaves_the_same_folders(files, tmp_path, monkeypatch, plain):
    # `eager` traces and runs; a compiler takes a minute or two.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    traced = []
    compile_teacher, compile_student = torch.nn.Module.compile, torch.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *a, **k: traced.append("teacher") or compile_teacher(*a, **k)
    )
    monkeypatch.setattr(torch, "compile", lambda *a, **k: traced.append("student") or compile_student(*a, **k))
    assert run(arguments(files, tmp_path, **WITH_BOTH)) == 0
    # `Module.compile` calls `torch.compile` with what the module does.
    assert traced.count("teacher") == 1 and traced.count("student") >= 2
    compiled = load_file(tmp_path / "task-01" / UNET)
    assert plain.keys() == compiled.keys()
    assert relative(flat(compiled), flat(plain)) < MAX_ROUNDING


def test_channels_last_changes_rounding_alone(files, tmp_path, plain):
    assert run(arguments(files, tmp_path, channels_last="true", **WITH_BOTH)) == 0
    last = load_file(tmp_path / "task-01" / UNET)
    assert 0 < relative(flat(last), flat(plain)) < MAX_ROUNDING


def test_the_backend_that_the_configuration_names(monkeypatch, files, tmp_path):
    backends = []

    def refuse(*args, backend, **kwargs):
        backends.append(backend)
        raise RuntimeError("enough")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(RuntimeError, match="enough"):
        run(arguments(files, tmp_path, dynamo_backend="inductor"))
    assert backends == ["inductor"]


def test_a_run_in_channels_last_goes_on_to_the_same_bits(files, tmp_path):
    settings = {"channels_last": "true", "use_ema": "true", "checkpointing_steps": "2", "checkpoints_total_limit": "2"}
    assert run(arguments(files, tmp_path / "whole", **settings)) == 0
    # Of ten steps: within the second task.
    kept = interrupted_copy(tmp_path / "whole", tmp_path / "part", 8, 1, replay=False)
    assert run(arguments(files, kept, **settings)) == 0
    whole, part = (load_file(tmp_path / name / "task-01" / UNET) for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_trackers_get_every_so_many_steps(monkeypatch, files, tmp_path):
    logged = []
    log = Accelerator.log
    monkeypatch.setattr(
        Accelerator, "log", lambda self, values, step: logged.append((step, *values)) or log(self, values, step)
    )
    assert run(arguments(files, tmp_path, logging_steps="3", report_to="tensorboard")) == 0
    # Two tasks of five steps; a task's last step is sent too.
    assert [step for step, first, *_ in logged if first == "loss"] == [3, 5, 6, 9, 10]
    assert len(read_log(tmp_path)) == 10


def test_another_seed_is_no_rounding(files, tmp_path, plain):
    assert run(arguments(files, tmp_path, seed="1", **WITH_BOTH)) == 0
    assert relative(flat(load_file(tmp_path / "task-01" / UNET)), flat(plain)) > 0.5

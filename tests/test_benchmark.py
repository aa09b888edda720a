"""scripts/benchmark.py: that what it compares with computes the same, how ratios are taken, and the script's own step."""

import json
import sys
from pathlib import Path

import pytest
import torch
from estimate_helpers import MOMENT_RTOL, flat, relative, value_and_gradient
from script_helpers import ROOT

from diffusers_cl import Rank1EWC
from diffusers_cl.fisher import diagonal_fisher, rank1_fisher


sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402 (not part of the package)
from benchmarks import baselines, estimates, script, steps, timing  # noqa: E402


CPU = torch.device("cpu")


def test_the_loops_compute_what_the_estimates_do(tiny_unet, make_batches, losses):
    batches = make_batches([5, 3])
    loop, ours = baselines.rank1_loop(tiny_unet, losses, batches), rank1_fisher(tiny_unet, losses, batches)
    assert ours.second_moment == pytest.approx(loop["second_moment"], rel=MOMENT_RTOL)
    assert ours.mean_gradient_norm == pytest.approx(loop["norm"], rel=MOMENT_RTOL)
    diagonal, _ = diagonal_fisher(tiny_unet, losses, batches)
    assert relative(flat(diagonal), baselines.diagonal_loop(tiny_unet, losses, batches).double()) < MOMENT_RTOL


def test_the_flat_penalty_computes_what_ours_does(tiny_unet, make_batches, losses):
    penalty, flat_penalty = Rank1EWC(1.0), baselines.FlatPenalty(tiny_unet, 0)
    for seed in range(2):
        fisher = penalty.consolidate(tiny_unet, losses, make_batches([4], seed=seed), diagnostics=False)
        # Its coefficient is a constant: the direction's length makes up for it.
        scale = (fisher.second_moment / 1e-12) ** 0.5
        anchor = flat(tiny_unet.parameters()).float()
        flat_penalty.tasks.append((scale * flat(fisher.direction.values()).float(), anchor))
    with torch.no_grad():
        for parameter in tiny_unet.parameters():
            parameter += 0.01
    value, gradient = value_and_gradient(penalty, tiny_unet)
    expected, expected_gradient = value_and_gradient(flat_penalty, tiny_unet)
    assert value == pytest.approx(expected, rel=1e-4) and relative(gradient, expected_gradient) < 1e-4


def test_ratios_are_of_the_same_repetition():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.in_turns(functions, CPU, repetitions=3, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"] and all(len(values) == 3 for values in times.values())
    times = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}
    row = timing.row("what", "net", times, "a", "b", "<= 1.5", about=1)
    assert (row["ratio"], row["least"], row["largest"], row["reached"]) == (2.0, 1.0, 3.0, False)
    assert row["seconds"] == {"a": 4.0, "b": 4.0} and row["about"] == 1
    assert timing.ratio_row("what", "net", [5.0], ">= 4")["reached"] is True


def test_the_lines_of_penalties_count_the_passes_of_a_whole_step():
    lines = steps.penalties("digits", 2, 20, (2,), CPU, repetitions=2)
    assert [line["what"].split(",")[0] for line in lines[:2]] == ["step with rank-1"] * 2
    assert all(line["ratio"] > 1 and line["tasks"] == 2 for line in lines)
    # Ten times the passes of two rows, and one update.
    assert all(line["seconds"]["with"] < 1.5 * line["seconds"]["step"] for line in lines)


def test_memory_in_vectors():
    rank1, diagonal = estimates.memory("digits", 3, CPU)
    assert (rank1["ratio"], diagonal["ratio"]) == (3.0, 2.0)
    assert rank1["reached"] and diagonal["reached"]


def test_the_scripts_own_step_is_measured(tmp_path):
    lines = script.script_steps("digits", None, CPU, num_steps=script.WARMUP + 4)
    by_name = {line["what"]: line for line in lines}
    # Of each task those after the warm-up, without the last, which saves a checkpoint... after it.
    assert {line["repetitions"] for line in lines[:5]} == {4}
    assert 0.5 < by_name["script's step with distillation, against its passes"]["ratio"] < 3
    assert by_name["images of a batch, share of the step"]["ratio"] < 0.03
    # The script is as it was.
    import train_continual

    assert train_continual.tqdm.__module__.startswith("tqdm") and train_continual.TaskImages is script.TaskImages


def test_a_whole_run_from_a_short_one(tmp_path):
    seconds = {"train": 100.0, "replay": 30.0, "evaluate": 20.0, "total": 150.0}
    (tmp_path / "run.json").write_text(json.dumps({"seconds": seconds, "device": "cuda (GPU)"}))
    config = {"max_train_steps": None, "num_train_epochs": 2}
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config}))
    assert benchmark.whole_run(tmp_path, 200)["minutes"] == pytest.approx((50 + 10_000) / 60)
    (tmp_path / "metrics.json").write_text(json.dumps({"config": {**config, "max_train_steps": 5}}))
    with pytest.raises(ValueError, match="max_train_steps is 5; allowed: null"):
        benchmark.whole_run(tmp_path, 200)


def test_the_command(tmp_path, monkeypatch, capsys):
    lines = [timing.ratio_row("this", "net", [1.0, 1.5, 2.0], "<= 1.4", seconds={"a": 1.0})]
    monkeypatch.setattr(benchmark, "parts_on_cpu", lambda device, args: {"one": lambda: lines, "two": lambda: []})
    output = tmp_path / "benchmark.json"
    threads = ["--threads", str(torch.get_num_threads())]
    assert benchmark.main(["--only", "one", "--output", str(output), *threads]) == 0
    content = json.loads(output.read_text())
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    assert content["lines"] == [{"part": "one", **lines[0]}] and content["threads"] == torch.get_num_threads()
    # What was measured before stays where it is not measured again.
    assert benchmark.main(["--only", "two", "--output", str(output), *threads]) == 0
    assert json.loads(output.read_text())["lines"] == content["lines"]
    assert list(json.loads(output.read_text())["parts"]) == ["one", "two"]
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "two", "--output", str(output), "--threads", "99"])
    assert "of another machine" in capsys.readouterr().err
    assert benchmark.main(["--only", "one", "--output", str(output), *threads]) == 0
    line = "| this | net | 1.500 (1.000 to 2.000) | <= 1.4: **not reached** |"
    assert f"{line}  |  |" in capsys.readouterr().out
    # The other machine's column.
    other = tmp_path / "other.json"
    more = [timing.ratio_row("this", "net", [1.0], "<= 1.4"), timing.ratio_row("that", "net", [3.0], ">= 3")]
    more.append(timing.ratio_row("beside", "net", [3.0]))
    other.write_text(json.dumps({"device": "a GPU", "lines": more}))
    assert benchmark.main(["--table", str(output), str(other)]) == 0
    shown = capsys.readouterr().out
    assert f"{line} 1.000 (1.000 to 1.000) | <= 1.4 |" in shown
    assert "| that | net |  |  | 3.000 (3.000 to 3.000) | >= 3 |" in shown and "beside" not in shown
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "three", *threads])
    assert "allowed: one, two" in capsys.readouterr().err


def test_the_parts_are_those_of_the_help():
    args = benchmark.argparse.Namespace(preset="digits", data=None, threads=1)
    on_cpu, on_gpu = (
        benchmark_parts(CPU, args) for benchmark_parts in (benchmark.parts_on_cpu, benchmark.parts_on_gpu)
    )
    assert list(on_cpu) == list(on_gpu)
    source = (Path(benchmark.__file__)).read_text()
    assert f"these parts: {', '.join(on_cpu)}" in source

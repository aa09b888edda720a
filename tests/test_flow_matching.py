"""objective: flow_matching: paths and velocity, sampling, and a run with replay and penalty that is gone on from."""

import dataclasses
import json
import runpy
import sys

import pytest
import torch
import yaml
from adopt_helpers import changed, edited, plain_model
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from pipeline_helpers import LABELS, noise, seeded, tiny_pipeline
from safetensors.torch import load_file
from script_helpers import ROOT, finished_run, read_log, run
from test_card import REPO, parts, section

from diffusers_cl.card import model_card
from diffusers_cl.config import TrainingConfig
from diffusers_cl.draws import FisherBatches
from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.losses import add_noise, denoising_losses, first_timestep, training_target
from diffusers_cl.models import create_scheduler
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.sampling import load_pipeline
from diffusers_cl.source import open_source
from diffusers_cl.start import load_start
from diffusers_cl.subject import open_subject


CPU = torch.device("cpu")
FLOW = TrainingConfig(objective="flow_matching")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """A run of two tasks with distillation, rank-1 EWC and three replayed images at a time."""
    return finished_run(tmp_path_factory, "flow-matching", objective="flow_matching")


def go_on(start, output_dir, **settings) -> list[str]:
    values = {"pretrained_model_name_or_path": start, "output_dir": output_dir, "dataset_name": "digits"}
    values |= {"tasks": "[[4]]", "max_train_steps": 3, "report_to": "none", "num_threads": 1, **settings}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def test_paths_are_straight_and_the_target_is_their_velocity():
    scheduler, generator = create_scheduler(FLOW), seeded()
    images, drawn = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([1, 250, 999, 1000])
    noisy = add_noise(scheduler, images, drawn, timesteps)
    for row, t in enumerate((0.001, 0.25, 0.999, 1.0)):
        # Rounding of float32 numbers of up to 4.
        torch.testing.assert_close(noisy[row], (1 - t) * images[row] + t * drawn[row], rtol=0, atol=1e-6)
    assert torch.equal(noisy[3], drawn[3])
    torch.testing.assert_close(noisy, scheduler.scale_noise(images, timesteps, drawn), rtol=0, atol=1e-6)
    target = training_target(scheduler, images, drawn, timesteps)
    assert torch.equal(target, drawn - images)
    # A step of the path's length along the velocity leads from one point to the other.
    torch.testing.assert_close(
        noisy[1] + (0.999 - 0.25) * target[1], 0.25 * drawn[1] + 0.75 * images[1] + 0.749 * target[1]
    )
    # What sampling leaves in the scheduler moves nothing.
    scheduler.set_timesteps(3)
    assert torch.equal(add_noise(scheduler, images, drawn, timesteps), noisy)


def test_diffusion_is_as_it_was():
    scheduler, images, drawn = create_scheduler(TrainingConfig()), noise(), noise() + 1
    timesteps = torch.tensor([0, 10, 500, 999])
    assert type(scheduler) is DDIMScheduler and first_timestep(scheduler) == 0
    assert torch.equal(add_noise(scheduler, images, drawn, timesteps), scheduler.add_noise(images, drawn, timesteps))
    assert create_scheduler(TrainingConfig(prediction_type="sample")).config.prediction_type == "sample"


class Images:
    """What [`FisherBatches`] asks of a task's images."""

    def __len__(self) -> int:
        return 6

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor([row for _, row in places])
        return rows.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8) * 40, rows % 4


@pytest.mark.parametrize("band", [(0, 1000), (0, 3), (997, 1000)])
def test_fisher_draws_are_those_of_diffusion_one_timestep_on(tiny_unet, band):
    settings = (60, band, 20, 0, 1, "cpu")
    flow = FisherBatches(Images(), create_scheduler(FLOW), *settings)
    diffusion = FisherBatches(Images(), create_scheduler(TrainingConfig()), *settings)
    for mine, other in zip(flow, diffusion, strict=True):
        assert torch.equal(mine[1], other[1] + 1) and torch.equal(mine[2], other[2])
        assert mine[1].min() >= band[0] + 1 and mine[1].max() <= band[1]
        # The other's target is the noise.
        images, sigmas = other[3] - mine[3], (mine[1] / 1000).view(-1, 1, 1, 1)
        torch.testing.assert_close(mine[0], (1 - sigmas) * images + sigmas * other[3], rtol=0, atol=1e-5)
        assert denoising_losses(tiny_unet, *mine).isfinite().all()
    if band == (0, 3):
        assert {t for batch in flow for t in batch[1].tolist()} == {1, 2, 3}


def straighten(pipe: ClassConditionalPipeline, images: torch.Tensor, start: torch.Tensor) -> list[float]:
    """Gives the model the velocity from `start` to `images`, and returns a list that gets the timesteps it is asked for."""
    asked: list[float] = []

    def forward(module, arguments, output):
        asked.append(float(arguments[1][0]))
        output.sample = start - images
        return output

    pipe.unet.register_forward_hook(forward)
    return asked


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        (FlowMatchEulerDiscreteScheduler, 1, [1000]),
        (FlowMatchEulerDiscreteScheduler, 4, [1000, 750, 500, 250]),
        (FlowMatchHeunDiscreteScheduler, 1, [1000]),
        (FlowMatchHeunDiscreteScheduler, 3, [1000, 500.5, 500.5, 1, 1]),
    ],
)
def test_sampling_a_straight_flow_is_exact(kind, steps, expected):
    pipe, start, images = tiny_pipeline(scheduler=kind()), noise(), noise() / 2 - 0.3
    asked = straighten(pipe, images, start)
    for _ in range(2):
        # A scheduler counts its steps, and starts anew.
        found = pipe(LABELS, steps, latents=start, output_type="latent").images
        # Heun's divides a difference of images by the sigma that it goes to, of which the last is 0.001.
        atol = 1e-5 if kind is FlowMatchEulerDiscreteScheduler else 1e-3
        torch.testing.assert_close(found, images, rtol=0, atol=atol)
    assert asked == pytest.approx([*expected, *expected])


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_sampling_is_deterministic_and_leaves_the_global_generator_alone(kind, caplog):
    pipe, before = tiny_pipeline(scheduler=kind()), torch.get_rng_state()
    first = pipe(LABELS, 3, latents=noise(), output_type="latent").images
    assert torch.equal(pipe(LABELS, 3, generator=seeded(), output_type="latent").images, first)
    assert torch.equal(pipe(LABELS, 3, latents=noise(), generator=seeded(5), output_type="latent").images, first)
    assert torch.equal(torch.get_rng_state(), before) and "eta" not in caplog.text
    assert torch.equal(pipe(LABELS, 3, eta=0.5, latents=noise(), output_type="latent").images, first)
    assert f"eta=0.5 is ignored: {kind.__name__}" in caplog.text


def test_flows_that_draw_noise_want_a_generator():
    for scheduler in (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()):
        pipe = tiny_pipeline(scheduler=scheduler)
        with pytest.raises(ValueError, match="latents without generator: FlowMatch.* may draw noise"):
            pipe(LABELS, 2, latents=noise())
        images = [pipe(LABELS, 2, latents=noise(), generator=seeded(1), output_type="pt").images for _ in range(2)]
        assert torch.equal(*images) and images[0].isfinite().all()


def test_a_run_with_replay_and_penalty(flow_run):
    metrics = json.loads((flow_run / "metrics.json").read_text())
    assert (
        metrics["config"]["objective"] == "flow_matching" and [f is not None for f in metrics["fisher"]] == [True] * 2
    )
    assert all(line["loss"] > 0 for line in read_log(flow_run)) and read_log(flow_run)[-1]["loss_replay"] > 0
    for task in ("task-00", "task-01"):
        content = json.loads((flow_run / task / "scheduler" / "scheduler_config.json").read_text())
        assert content["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    # In training, replay and evaluation the images are those of the flow, and not of DDIM.
    replay = load_file(flow_run / "replay" / "task-01" / "images.safetensors")
    assert replay["class_labels"].tolist() == [0, 0, 1, 1]
    pipe = load_pipeline(flow_run / "task-00", CPU, "model")
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_its_folder_is_a_diffusers_model_and_heun_samples_it(flow_run):
    mine = load_pipeline(flow_run / "task-01", CPU, "model")
    other = DiffusionPipeline.from_pretrained(flow_run / "task-01", trust_remote_code=True)
    latents = noise()
    for _ in range(2):
        images = [
            pipe(["0", "1", "2", "3"], 3, latents=latents, output_type="latent").images for pipe in (mine, other)
        ]
        assert torch.equal(*images) and type(other.scheduler) is type(mine.scheduler)
        for pipe in (mine, other):
            pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert "objective | flow_matching" in (flow_run / "task-01" / "README.md").read_text()


def test_scripts_take_the_folder(flow_run, tmp_path, monkeypatch):
    folder, common = str(flow_run / "task-01"), ["--num_inference_steps", "2", "--device", "cpu"]
    commands = {
        "sample.py": ["--model", folder, "--num_images", "2", "--output_dir", str(tmp_path / "samples"), *common],
        "gate.py": [
            folder,
            folder,
            "--num_images",
            "20",
            "--resamplings",
            "100",
            "--output_dir",
            str(tmp_path),
            *common,
        ],
    }
    for script, command in commands.items():
        monkeypatch.setattr(sys, "argv", [script, *command])
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as stopped:
            assert stopped.code == 0
    assert (tmp_path / "samples" / "grid.png").exists()
    assert json.loads((tmp_path / "gate.json").read_text())["passed"]


def test_it_is_gone_on_from_as_a_flow(flow_run, files, tmp_path, capsys):
    start = flow_run / "task-01"
    assert run(go_on(start, tmp_path / "other", objective="diffusion", cache_dir=files / "cache")) == 2
    assert "objective is 'diffusion'; allowed: 'flow_matching'" in capsys.readouterr().err
    assert run(go_on(start, tmp_path / "run", cache_dir=files / "cache")) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["objective"] == "flow_matching"
    pipe = load_pipeline(tmp_path / "run" / "task-02", CPU, "model")
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and len(pipe.known_classes) == 5


def test_states_of_before_the_key_are_of_diffusion(flow_run, files, tmp_path, capsys):
    def forget(state: dict) -> None:
        del state["config"]["objective"]

    older = edited(flow_run / "task-01", tmp_path / "task-01", files={"consolidation/state.json": forget})
    command = go_on(older, tmp_path / "run", cache_dir=files / "cache")
    assert run([*command, "--objective", "flow_matching"]) == 2
    assert "objective is 'flow_matching'; allowed: 'diffusion'" in capsys.readouterr().err
    # Here it is not true: the scheduler in the folder is not taken for DDIM's.
    assert run(command) == 4
    assert "allowed: 'DDIMScheduler'" in capsys.readouterr().err


def test_a_scheduler_of_another_class_is_refused(tmp_path):
    for config, other in ((FLOW, DDIMScheduler()), (TrainingConfig(), FlowMatchEulerDiscreteScheduler())):
        other.save_pretrained(tmp_path / "scheduler")
        with pytest.raises(CheckpointError, match=f"_class_name is '{type(other).__name__}'; allowed: "):
            create_scheduler(config, tmp_path)
    with pytest.raises(CheckpointError, match="scheduler_config.json"):
        create_scheduler(FLOW, tmp_path / "nowhere")


def test_the_card_shows_what_can_drive_a_flow(tmp_path):
    pipeline, state, metrics, config = parts(tmp_path, objective="flow_matching")
    flow = ClassConditionalPipeline(pipeline.unet, create_scheduler(FLOW), pipeline.known_classes)
    card = model_card(flow, state, metrics, config, REPO)
    assert "ConsistencyModelPipeline" not in card and section(card, "Sampling").count("```python") == 2
    assert "A class-conditional flow-matching model (`UNet2DModel`" in card
    assert "diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)" in card
    usual = model_card(pipeline, state, metrics, dataclasses.replace(config, objective="diffusion"), REPO)
    assert "A class-conditional diffusion model" in usual and "ConsistencyModelPipeline" in usual


def test_a_flow_of_elsewhere_is_adopted(files, tmp_path_factory, tmp_path):
    plain = plain_model(tmp_path_factory)
    heun = {"_class_name": "FlowMatchHeunDiscreteScheduler", "beta_schedule": None, "shift": 3.0}
    model = changed(plain, tmp_path / "model", scheduler=heun)
    scheduler = open_source(str(model)).scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler and scheduler.config.shift == 3.0


def test_adopting_one_keeps_the_objective(flow_run, files, tmp_path, monkeypatch):
    # As of a joint run, whose one folder is no task to go on from.
    options = [
        "--num_images_per_class",
        "8",
        "--num_inference_steps",
        "2",
        "--device",
        "cpu",
        "--penalty",
        "rank1_ewc",
    ]
    options += ["--feature_extractor", str(files / "extractor"), "--output_dir", str(tmp_path / "adopted")]
    monkeypatch.setattr(sys, "argv", ["adopt.py", "--model", str(flow_run / "task-01"), *options])
    runpy.run_path(str(ROOT / "scripts" / "adopt.py"), run_name="__main__")
    start = load_start(TrainingConfig(dataset_name="digits", pretrained_model_name_or_path=str(tmp_path / "adopted")))
    assert start.settings["objective"] == "flow_matching"
    assert type(create_scheduler(FLOW, start.folder)) is FlowMatchEulerDiscreteScheduler


def test_the_analysis_of_diffusion_refuses_a_flow(flow_run):
    with pytest.raises(ConfigError, match="is of flow matching; allowed: diffusion models"):
        open_subject(str(flow_run / "task-01"), "digits", CPU)

"""The pipeline and scripts/sample.py: what is drawn, what is saved, and who can load it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_cl.pipeline
from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.pipeline import ClassConditionalPipeline, to_uint8
from diffusers_cl.randomness import generator


SOURCE = Path(diffusers_cl.pipeline.__file__)
SAMPLE_SCRIPT = SOURCE.parents[1] / "scripts" / "sample.py"

# Class 2 is not among them: the model has a row for it and has not seen it. The class named 7 has another id.
ID2LABEL = {0: "cat", 1: "7", 3: "dog"}
LABELS = ["cat", 3, 1, "7"]

# What someone without diffusers-cl does with a published folder; run twice, on the folder and on what it saved.
STRANGER = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_cl":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Blocked())
try:
    import diffusers_cl
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("diffusers_cl can be imported")

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

folder, other_version, saved_again, results = sys.argv[1:]


def seeded():
    return torch.Generator().manual_seed(0)


try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("the folder's code was run without trust_remote_code")

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipe).__name__ == "ClassConditionalPipeline" and type(pipe).__module__.startswith("diffusers_modules.")
# This writes other code to the file that pipe's class was loaded from.
DiffusionPipeline.from_pretrained(other_version, trust_remote_code=True)
pipe.save_pretrained(saved_again)

zero_trust = ConsistencyModelPipeline(
    UNet2DModel.from_pretrained(folder, subfolder="unet"), DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
)
np.savez(
    results,
    images=pipe(["cat", 3, 1, "7"], generator=seeded(), num_inference_steps=5, output_type="np").images,
    zero_trust=zero_trust(
        batch_size=4, class_labels=[0, 3, 1, 1], generator=seeded(), num_inference_steps=5, output_type="np"
    ).images,
)
"""


def tiny_unet(channels: int = 1, **kwargs) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"num_class_embeds": 4, **kwargs},
    )


def tiny_pipeline(channels: int = 1, scheduler=None, id2label=ID2LABEL) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(tiny_unet(channels), scheduler or DDIMScheduler(), id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(channels: int = 1, num_images: int = 4) -> torch.Tensor:
    return torch.randn(num_images, channels, 8, 8, generator=seeded())


def saved_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "task-00"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_to_uint8_clamps_and_rounds():
    images = torch.tensor([-9.0, -1.0, -0.5, 0.0, 1.0, 9.0])
    assert to_uint8(images).tolist() == [0, 0, 64, 128, 255, 255]  # 63.75 and 127.5 before rounding
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    # In bfloat16 itself the sum and the product would be rounded, to 192.
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).item() == 191


def test_names_and_ids():
    pipe = tiny_pipeline()
    assert pipe.known_classes == ID2LABEL
    assert pipe.get_label_ids(LABELS) == [0, 3, 1, 1]
    assert pipe.get_label_ids("7") == pipe.get_label_ids(1) == pipe.get_label_ids(torch.tensor(1)) == [1]
    assert pipe.get_label_ids(torch.tensor([3, 0])) == pipe.get_label_ids(np.array([3, 0])) == [3, 0]

    by_name = pipe(["cat", "dog"], num_inference_steps=2, generator=seeded(), output_type="np").images
    by_id = pipe(torch.tensor([0, 3]), num_inference_steps=2, generator=seeded(), output_type="np").images
    assert np.array_equal(by_name, by_id)

    unnamed = tiny_pipeline(id2label=None)
    assert unnamed.known_classes == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert unnamed.get_label_ids(["2", 2]) == [2, 2]


@pytest.mark.parametrize("label", [2, 4, -1, 0.5, 1.0, "bird", "3", ["cat", "bird"], torch.tensor([0.0])])
def test_unknown_class_lists_the_known(label):
    with pytest.raises(ValueError, match=r"class_labels .*Known \(id: name\): 0: 'cat', 1: '7', 3: 'dog'$"):
        tiny_pipeline()(label)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"cat": 0}, "maps class ids to names"),
        ({-1: "cat"}, "maps class ids to names"),
        ({0: "cat", 1: "cat"}, "one name"),
        ({4: "cat"}, "beyond the model's 4 classes"),
    ],
)
def test_wrong_id2label(id2label, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(id2label=id2label)


def test_unconditional_model_is_refused():
    with pytest.raises(ValueError, match="num_class_embeds"):
        ClassConditionalPipeline(tiny_unet(num_class_embeds=None), DDIMScheduler())


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_diffusers_consistency_model_pipeline(channels):
    pipe = tiny_pipeline(channels)
    # A generator, not latents: it takes latents of three channels only.
    expected = ConsistencyModelPipeline(pipe.unet, DDIMScheduler())(
        batch_size=4, class_labels=[0, 3, 1, 1], generator=seeded(), num_inference_steps=5, output_type="np"
    ).images
    actual = pipe(LABELS, num_inference_steps=5, latents=noise(channels), output_type="np").images
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDIMScheduler(), 0.0),
        (DDIMScheduler(clip_sample=False), 1.0),
        (DDPMScheduler(), 0.0),
        (EulerDiscreteScheduler(), 0.0),
    ],
    ids=["ddim", "ddim-eta", "ddpm", "euler"],
)
def test_equal_to_a_handwritten_loop(scheduler, eta):
    pipe = tiny_pipeline(scheduler=scheduler)
    assert pipe.scheduler is scheduler
    actual = pipe(LABELS, 4, eta=eta, generator=seeded(1), latents=noise(), output_type="latent").images

    scheduler.set_timesteps(4)
    expected, step_generator = noise() * scheduler.init_noise_sigma, seeded(1)
    kwargs = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    for t in scheduler.timesteps:
        with torch.no_grad():
            sample = scheduler.scale_model_input(expected, t)
            model_output = pipe.unet(sample, t, class_labels=torch.tensor([0, 3, 1, 1])).sample
        expected = scheduler.step(model_output, t, expected, generator=step_generator, **kwargs).prev_sample
    assert torch.equal(actual, expected)


def test_transformer_denoiser():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=4,
    )
    pipe = ClassConditionalPipeline(transformer, DDIMScheduler())
    assert list(pipe.known_classes) == [0, 1, 2, 3]
    images = pipe([0, 3], num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_generators():
    pipe = tiny_pipeline()
    kwargs = {"num_inference_steps": 3, "output_type": "latent"}
    drawn = pipe(LABELS, generator=seeded(), **kwargs).images
    assert torch.equal(drawn, pipe(LABELS, latents=noise(), **kwargs).images)

    # One generator an image: the image does not depend on its batch. The tolerance is for a convolution that sums in
    # another order for another batch size.
    together = pipe(LABELS, eta=1.0, generator=[seeded(i) for i in range(4)], **kwargs).images
    alone = pipe(LABELS[2], eta=1.0, generator=[seeded(2)], **kwargs).images
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = tiny_pipeline(channels, DDIMScheduler(clip_sample=False))
    kwargs = {"num_inference_steps": 3, "latents": noise(channels)}
    raw = pipe(LABELS, output_type="latent", **kwargs).images
    assert raw.shape == (4, channels, 8, 8) and raw.abs().max() > 1
    pt = pipe(LABELS, output_type="pt", **kwargs).images
    assert torch.equal(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(pipe(LABELS, output_type="np", **kwargs).images, pt.permute(0, 2, 3, 1).numpy())

    (images,) = pipe(LABELS, return_dict=False, **kwargs)
    assert [image.mode for image in images] == [mode] * 4
    pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in images])
    assert np.array_equal(pixels, to_uint8(raw).permute(0, 2, 3, 1).numpy())


def test_modes_are_restored():
    unet = tiny_unet(dropout=0.5)
    pipe = ClassConditionalPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    unet.eval()
    expected = pipe([0], 2, latents=noise(num_images=1), output_type="latent").images
    assert not any(module.training for module in unet.modules())

    unet.train()
    unet.mid_block.eval()
    modes = [module.training for module in unet.modules()]
    actual = pipe([0], 2, latents=noise(num_images=1), output_type="latent").images
    assert torch.equal(actual, expected), "dropout was active"
    assert [module.training for module in unet.modules()] == modes
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe([0], 2000, latents=noise(num_images=1))
    assert [module.training for module in unet.modules()] == modes
    assert not actual.requires_grad


def test_global_rng_is_untouched():
    latents = noise()
    before = torch.get_rng_state()
    tiny = tiny_pipeline()
    torch.set_rng_state(before)
    tiny(LABELS, 2, latents=latents)
    tiny(LABELS, 2, eta=1.0, latents=latents, generator=seeded())
    tiny(LABELS, 2, eta=1.0, generator=seeded())
    with pytest.raises(ValueError, match="latents without generator"):
        tiny(LABELS, 2, eta=1.0, latents=latents)
    tiny.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="DDPMScheduler may draw noise"):
        tiny(LABELS, 2, latents=latents)
    tiny(LABELS, 2, latents=latents, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(latents, noise()), "latents were changed in place"


def test_eta_is_ignored_with_a_warning(caplog):
    pipe = tiny_pipeline(scheduler=DDPMScheduler())
    expected = pipe(LABELS, 2, generator=seeded(), output_type="latent").images
    actual = pipe(LABELS, 2, eta=0.5, generator=seeded(), output_type="latent").images
    assert torch.equal(actual, expected)
    assert "eta=0.5 is ignored: DDPMScheduler" in caplog.text


def test_wrong_arguments():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="output_type 'jpg'"):
        pipe(LABELS, output_type="jpg")
    with pytest.raises(ValueError, match=r"latents are of shape \(3, 1, 8, 8\), expected \(4, 1, 8, 8\)"):
        pipe(LABELS, latents=noise(num_images=3))
    with pytest.raises(ValueError, match="generator is a list of 1, class_labels has 4"):
        pipe(LABELS, generator=[seeded()])


def test_saved_folder(saved):
    model_index = json.loads((saved / "model_index.json").read_text())
    assert model_index.pop("_diffusers_version")
    assert model_index == {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "id2label": {"0": "cat", "1": "7", "3": "dog"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert (saved / "pipeline.py").read_bytes() == SOURCE.read_bytes()


def test_own_class_loads_without_trust(saved, tmp_path):
    folder = tmp_path / "copy"
    ClassConditionalPipeline.from_pretrained(saved).save_pretrained(folder)
    # Code that our class must not run.
    (folder / "pipeline.py").write_text("raise RuntimeError\n")
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    assert type(pipe) is ClassConditionalPipeline and pipe.known_classes == ID2LABEL
    expected = tiny_pipeline()(LABELS, 3, latents=noise(), output_type="latent").images
    assert torch.equal(pipe(LABELS, 3, latents=noise(), output_type="latent").images, expected)


def test_own_class_loads_from_the_hub_cache(saved, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--user--digits"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(saved, target_is_directory=True)
    pipe = ClassConditionalPipeline.from_pretrained("user/digits", cache_dir=tmp_path, local_files_only=True)
    assert type(pipe) is ClassConditionalPipeline and pipe.known_classes == ID2LABEL


def test_scheduler_and_many_classes_survive_saving(tmp_path):
    id2label = {class_id: f"class {class_id}" for class_id in range(12)}
    pipe = ClassConditionalPipeline(tiny_unet(num_class_embeds=12), DDPMScheduler(beta_end=0.01), id2label=id2label)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDPMScheduler and loaded.scheduler.config.beta_end == 0.01
    # JSON has them as 0, 1, 10, 11, 2, ...
    assert list(loaded.known_classes.items()) == list(id2label.items())


def test_round_trip_without_the_package(saved, tmp_path):
    other_version = tmp_path / "other-version"
    tiny_pipeline().save_pretrained(other_version)
    with open(other_version / "pipeline.py", "a") as file:
        file.write("\n# another version\n")

    expected = tiny_pipeline()(LABELS, 5, latents=noise(), output_type="np").images
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DIFFUSERS_"))}
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    folders = [saved, tmp_path / "saved-again", tmp_path / "saved-thrice"]
    for folder, saved_again in zip(folders, folders[1:], strict=False):
        results = tmp_path / "results.npz"
        process = subprocess.run(
            [sys.executable, "-I", "-c", STRANGER, folder, other_version, saved_again, results],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert "Expected types" not in process.stderr, process.stderr
        with np.load(results) as images:
            assert np.array_equal(images["images"], expected)
            assert np.array_equal(images["zero_trust"], expected)

        before, after = saved_files(folder), saved_files(saved_again)
        assert before.keys() == after.keys()
        # Loading adds where from to the JSON files, and nothing else changes.
        assert all(before[name] == after[name] for name in before if not name.endswith(".json"))


@pytest.fixture(scope="module")
def sample_script() -> dict:
    return runpy.run_path(str(SAMPLE_SCRIPT))


def run_sample(sample_script: dict, *options: str) -> Path:
    return sample_script["sample"](sample_script["parse_args"]([*options, "--num_inference_steps", "3"])).parent


def test_sample_script(saved, tmp_path, sample_script):
    options = ["--model", str(saved), "--num_images", "3", "--device", "cpu", "--batch_size", "4"]
    everything = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "all"))
    files = {path.name for path in everything.iterdir()}
    assert files == {f"{name}-{index:03d}.png" for name in ("cat", "7", "dog") for index in range(3)} | {"grid.png"}

    with Image.open(everything / "grid.png") as grid:
        pixels = np.asarray(grid)
    # Images of 64 pixels with 4 pixels around each.
    assert pixels.shape == (3 * 68 + 4, 3 * 68 + 4, 3)
    for row, name in enumerate(["cat", "7", "dog"]):
        for index in range(3):
            with Image.open(everything / f"{name}-{index:03d}.png") as image:
                assert image.size == (8, 8) and image.mode == "L"
                image = np.asarray(image)
            top, left = 4 + row * 68, 4 + index * 68
            cell = pixels[top : top + 64, left : left + 64]
            assert np.array_equal(cell, image.repeat(8, axis=0).repeat(8, axis=1)[..., None].repeat(3, axis=2))
            class_id = [0, 1, 3][row]
            expected = tiny_pipeline()(class_id, 3, generator=generator(0, "eval", name, index)).images[0]
            # One level of 255 where another batch size rounds the other way.
            assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1

    again = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "again"))
    assert saved_files(again) == saved_files(everything)
    other_seed = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "other"), "--seed", "1")
    assert all(saved_files(other_seed)[name] != image for name, image in saved_files(everything).items())


def test_sample_script_takes_names_before_ids(saved, tmp_path, sample_script, capsys):
    options = ["--model", str(saved), "--num_images", "1", "--device", "cpu", "--output_dir", str(tmp_path)]
    run_sample(sample_script, *options, "--classes", "3", "7", "dog")
    assert capsys.readouterr().out.endswith("grid.png: rows are dog, 7\n")
    assert {path.name for path in tmp_path.iterdir()} == {"7-000.png", "dog-000.png", "grid.png"}


def test_sample_script_wants_a_task_folder(saved, tmp_path, sample_script):
    (tmp_path / "task-00").symlink_to(saved, target_is_directory=True)
    with pytest.raises(ConfigError, match=r"is the folder of a run, pass one of its tasks: .*task-00$"):
        run_sample(sample_script, "--model", str(tmp_path), "--output_dir", str(tmp_path / "samples"))


def test_sample_script_file_names(sample_script):
    assert sample_script["file_name"]("n01440764 tench", 12) == "n01440764 tench-012.png"
    assert sample_script["file_name"]("a/b%", 0) == "a%2Fb%25-000.png"


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--classes", "cat", "bird"], 2, r"--classes: .*'bird'.* Known \(id: name\): 0: 'cat', 1: '7', 3: 'dog'$"),
        (["--classes", "2"], 2, "--classes: .*2: not known"),
        (["--num_inference_steps", "1001"], 2, "--num_inference_steps 1001: the model has 1000"),
        (["--device", "warp"], 2, "--device warp cannot be used"),
        (["--num_images", "0"], 2, "argument --num_images: invalid"),
        (["--model", "no/such/folder"], 4, "--model no/such/folder cannot be loaded"),
    ],
)
def test_sample_script_errors(saved, tmp_path, monkeypatch, capsys, options, exit_code, message):
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--model", str(saved), "--device", "cpu", "--output_dir", str(tmp_path), *options]
    )
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SAMPLE_SCRIPT), run_name="__main__")
    assert exit_info.value.code == exit_code
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.splitlines()[-1]), error
    assert not list(tmp_path.iterdir())


def test_sample_script_refuses_a_model_without_all_weights(saved, tmp_path, sample_script):
    shutil.copytree(saved, tmp_path / "model")
    weights_file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    del weights["conv_out.weight"]
    save_file(weights, weights_file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights: conv_out.weight"):
        run_sample(sample_script, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "samples"))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_do_not_wait_for_the_gpu():
    pipe = tiny_pipeline().to("cuda")
    num_waits = []
    for num_inference_steps in (2, 2, 8):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as warned:
                pipe(LABELS, num_inference_steps, latents=noise(), output_type="latent")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        num_waits.append(len(warned))
    # The first call also sets up.
    assert num_waits[1] == num_waits[2]

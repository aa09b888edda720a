"""What the pipeline saves, and who can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from pipeline_helpers import ID2LABEL, LABELS, noise, saved_files, tiny_pipeline, tiny_unet

import diffusers_cl.pipeline
from diffusers_cl.pipeline import ClassConditionalPipeline


SOURCE = Path(diffusers_cl.pipeline.__file__)

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

"""A run that goes on with other data, another network or other threads says so before anything is trained or changed."""

import json
import shutil

from PIL import Image
from script_helpers import arguments, run, write_images


def test_what_changed_is_named_with_both_values(files, tmp_path, capfd):
    data, network = write_images(tmp_path / "data", {"cat": 20, "dog": 20}), tmp_path / "unet.json"
    shutil.copy(files / "unet.json", network)
    settings = {"dataset_name": "null", "train_data_dir": data, "tasks": "[[cat], [dog]]", "max_train_steps": 2}
    settings |= {"replay": "none", "penalty": "none", "model_config_name_or_path": network}
    output_dir = tmp_path / "run"

    def refused(exit_code: int, *words: str, **changed) -> None:
        assert run(arguments(files, output_dir, **settings | changed)) == exit_code
        message = capfd.readouterr().err.rpartition("train_continual.py: error: ")[2]
        assert [word for word in words if word not in message] == []
        assert not (output_dir / "task-01").exists()
        assert json.loads((output_dir / "status.json").read_text())["exit_code"] == exit_code

    assert run(arguments(files, output_dir, **settings)) == 0
    shutil.rmtree(output_dir / "task-01")

    # An image more, of the same classes.
    Image.new("L", (8, 8), 200).save(data / "dog" / "99.png")
    refused(3, "40 images", "41 images", "fingerprint")
    (data / "dog" / "99.png").unlink()
    # A class that the run does not have: other images of the others are held out.
    write_images(data, {"bird": 5})
    refused(3, "40 images", "fingerprint")
    shutil.rmtree(data / "bird")
    content = json.loads(network.read_text())
    network.write_text(json.dumps(content | {"block_out_channels": [8, 24]}))
    refused(2, "block_out_channels", "[8, 16]", "[8, 24]")
    network.write_text(json.dumps(content))
    refused(4, "threads 1 before, 2 now", "num_threads", "allow_inexact", num_threads=2)

    assert run(arguments(files, output_dir, **settings | {"num_threads": 2}, allow_inexact=True)) == 0
    assert json.loads((output_dir / "run.json").read_text())["inexact"] == [{"key": "threads", "before": 1, "now": 2}]

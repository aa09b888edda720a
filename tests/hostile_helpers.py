"""What the tests of security share: what is good, hostile files to put in its place, and code that writes a canary."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pipeline_helpers import tiny_pipeline, tiny_unet
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from diffusers_cl.checkpoint import save_checkpoint
from diffusers_cl.classifier import SmallClassifier
from diffusers_cl.features import FeatureExtractor, save_extractor
from diffusers_cl.files import file_sha256, publish_folder
from diffusers_cl.references import References
from diffusers_cl.start import FIXED_KEYS


CPU = torch.device("cpu")
MANIFEST = "consolidation/manifest.json"
STATE = "consolidation/state.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Writes a hostile file into a folder with what is good: `plant(folder, canary, kind)`. Its code would write the canary.
Plant = Callable[[Path, Path, int], None]


class Payload:
    """Unpickling it writes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def pickled(canary: Path, kind: int) -> bytes:
    """Returns a pickle with a payload: bare, of any protocol, or as `torch.save` writes it."""
    content = {"weight": torch.zeros(2), "code": Payload(canary)}
    if kind % 8 < 6:
        return pickle.dumps(content, protocol=kind % 8)
    saved = canary.with_suffix(".pt")
    torch.save(content, saved, _use_new_zipfile_serialization=kind % 8 == 6)
    return saved.read_bytes()


def bomb(canary: Path, kind: int) -> bytes:
    """Returns no safetensors: a header too long, tensors one over the other or beyond all memory, brackets, nothing."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header, rest, length = (
        (b"{}", b"", 2**63),
        (b"{}", bytes(1000), 100_000_000),
        (json.dumps({"a": one, "b": one | {"data_offsets": [4, 12]}}).encode(), bytes(12), None),
        (json.dumps({"a": one | {"shape": [2**40, 2**40]}}).encode(), bytes(8), None),
        (b"[" * 100_000, b"", None),
        (b"", b"", 0),
    )[kind % 6]
    return (len(header) if length is None else length).to_bytes(8, "little") + header + rest


def write(path: Path, content: bytes | str | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(path: Path, **values) -> None:
    write(path, json.loads(path.read_text()) | values)


def write_code(path: Path, canary: Path) -> None:
    write(path, f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")


def sign(folder: Path, more: dict[str, str]) -> None:
    """Makes the checksums of a folder right again, which are no secret."""
    for manifest in folder.rglob("manifest.json"):
        names = [path for path in folder.rglob("*") if path.is_file() and path != manifest]
        write(manifest, {"sha256": {path.relative_to(folder).as_posix(): file_sha256(path) for path in names} | more})


def replaced(name: str, content: Callable[[Path, int], bytes | str], removed: str | None = None) -> Plant:
    def plant(folder: Path, canary: Path, kind: int) -> None:
        if removed is not None:
            (folder / removed).unlink()
        write(folder / name, content(canary, kind))
        sign(folder, {})

    return plant


def brackets(canary: Path, kind: int) -> str:
    return '{"a":' * 200_000


def pickled_manifest(folder: Path, canary: Path, kind: int) -> None:
    write(folder / MANIFEST, pickled(canary, kind))


def sharded(weights: str) -> Plant:
    """An index of weights that lie outside, or are none."""

    def plant(folder: Path, canary: Path, kind: int) -> None:
        outside = folder.parent / "outside" / "shard.safetensors"
        shutil.move(folder / weights, outside)
        write(
            folder / weights.replace("diffusion_pytorch_model", "model").replace("safetensors", "bin"),
            pickled(canary, 6),
        )
        relative = Path(*[".."] * (weights.count("/") + 1), "outside", outside.name)
        shard = (str(outside), str(relative), "model.bin")[kind % 3]
        write(folder / f"{weights}.index.json", {"metadata": {"total_size": 1}, "weight_map": {"a.weight": shard}})

    return plant


def linked(name: str) -> Plant:
    def plant(folder: Path, canary: Path, kind: int) -> None:
        target = folder.parent / "outside" / Path(name).name
        shutil.move(folder / name, target)
        relative = Path(*[".."] * (name.count("/") + 1), "outside", target.name)
        (folder / name).symlink_to(target if kind % 2 else relative)

    return plant


def foreign_names(folder: Path, canary: Path, kind: int) -> None:
    outside = folder.parent / "outside" / "secret.txt"
    name = ("../outside/secret.txt", str(outside), "unet/../../outside/secret.txt")[kind % 3]
    sign(folder, {name: file_sha256(outside)})


def code_beside(folder: Path, canary: Path, kind: int) -> None:
    for name in (
        "pipeline.py",
        "funlora.py",
        "unet/evil.py",
        "unet/diffusers.py",
        "scheduler/evil.py",
        "evil.py",
        "adapters/funlora.py",
    ):
        write_code(folder / name, canary)
    custom = {"custom_pipeline": str(folder)} if kind % 2 else {}
    change(folder / "model_index.json", _class_name=["evil", "Evil"], tokenizer=["evil", "Evil"], **custom)
    change(folder / "unet/config.json", _class_name="evil.Evil", auto_map={"AutoModel": "evil.Evil"})
    change(folder / "scheduler/scheduler_config.json", _class_name="os.system", auto_map={"AutoModel": "evil.Evil"})


def foreign_classes(folder: Path, canary: Path, kind: int) -> None:
    for name in ("unet", "scheduler"):
        write_code(folder / name / "evil.py", canary)
    pairs = (
        ["evil", "UNet2DModel"],
        ["os", "system"],
        ["evil", "Evil"],
        [None, None],
        ["subprocess", "Popen"],
        "evil",
        ["diffusers", "utils"],
    )
    change(folder / "model_index.json", **{("unet", "scheduler")[kind % 2]: pairs[kind % len(pairs)]})


def coded_classifier(folder: Path, canary: Path, kind: int) -> None:
    """A network, or what prepares its images, that transformers does not have, with its code."""
    write_code(folder / "modeling_evil.py", canary)
    names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    autos = {"auto_map": dict.fromkeys(names, "modeling_evil.Evil")}
    if kind % 2:
        change(folder / "preprocessor_config.json", **autos, image_processor_type="Evil")
    else:
        change(folder / "config.json", **autos, model_type="evil", architectures=["Evil"])


def coded_data(folder: Path, canary: Path, kind: int) -> None:
    """A dataset of which all is code: the script that datasets once ran, and a pickled table."""
    for path in list(folder.iterdir()):
        path.unlink()
    if kind % 2:
        write_code(folder / f"{folder.name}.py", canary)
    else:
        write(folder / "train.pkl", pickled(canary, 4))
        write(folder / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n")


def write_good(folder: Path) -> None:
    """Writes what the slots spoil: `task/`, `classifier/`, `kept/` and `checkpoint-1/`."""
    settings = dict.fromkeys(("stream", "penalty", "feature_extractor", *FIXED_KEYS), "none")
    state = {"schema": 1, "task": 0, "tasks": [["cat"]], "class_ids": {"cat": 0}, "seen_classes": ["cat"], "rows": []}
    state |= {"dataset": "none", "fisher": [], "floor": {}, "config": settings}
    state |= {"feature_extractor_info": {"name": "classifier", "sha256": ""}}

    def write_task(partial: Path) -> None:
        tiny_pipeline().save_pretrained(partial)
        write(partial / STATE, state)

    publish_folder(folder / "task", write_task, "consolidation")
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder / "classifier")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder / "classifier")
    unet = tiny_unet()
    optimizer = torch.optim.AdamW(unet.parameters())
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(folder, 1, unet, optimizer, {"task": 0, "lr_scheduler": {}, "scaler": None})
    (folder / "kept").mkdir()
    extractor = FeatureExtractor("classifier", SmallClassifier(1, 2, 8), CPU, ["cat", "dog"])
    save_extractor(extractor, folder / "kept")
    write(folder / "kept" / "info.json", extractor.info)
    references = References()
    references.append(torch.rand(4, 3), ["cat"] * 4, None)
    references.save(folder / "kept")

"""No code of ours writes or reads a pickle, runs what it was given, or trusts a repo; and no file of a run is a pickle."""

import ast
import json
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from script_helpers import ROOT, finished_run


# By the dotted names of what is called; a trailing dot stands for all of a module.
FORBIDDEN = (
    *("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Pickler", "pickle.Unpickler"),
    *("dill.", "cloudpickle.", "joblib.", "shelve.", "marshal.", "eval", "exec", "compile", "__import__"),
    *("torch.save", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "pandas.read_pickle"),
    *("numpy.save", "numpy.savez", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "accelerate.save_state"),
)
# Calls that are allowed with these words alone.
NEEDED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def faults_of(source: str) -> list[str]:
    """Returns the calls in a module that are not allowed."""
    tree, names, faults = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    # Loaders of this module's own that are of the safe kind.
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe = {node.name for node in classes if [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = ast.unparse(node.func).split(".")
        called = ".".join([names.get(first, first), *rest])
        if called == "yaml.load" and [ast.unparse(value) for value in node.args[1:]] in [[name] for name in safe]:
            continue
        words = {word.arg: getattr(word.value, "value", "dynamic") for word in node.keywords}
        needed = [NEEDED[called]] if called in NEEDED else []
        if rest and rest[-1] == "from_pretrained":
            needed += (
                [("use_safetensors", True)]
                if first.startswith("AutoModel") or first.endswith(("Model", "Pipeline"))
                else []
            )
            needed += [("trust_remote_code", False)] if first.startswith("Auto") else []
        if (
            any(called == name or (name.endswith(".") and called.startswith(name)) for name in FORBIDDEN)
            or any(words.get(word) is not value for word, value in needed)
            or words.get("trust_remote_code", False) is not False
            or words.get("shell", False) is not False
        ):
            faults.append(ast.unparse(node))
    return faults


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import load as read\nread(file)",
        "import pickle as p\np.Unpickler(file).load()",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "from torch import save\nsave(tensors, path)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import joblib\njoblib.load(path)",
        "import shelve\nshelve.open(path)",
        "from marshal import loads\nloads(b'')",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nclass Own(yaml.Loader): pass\nyaml.load(text, Own)",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "load_dataset(name, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=flag)",
        "UNet2DModel.from_pretrained(folder)",
        "ClassConditionalPipeline.from_pretrained(folder, use_safetensors=False)",
        "AutoImageProcessor.from_pretrained(folder)",
        "AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)",
    ],
)
def test_the_reader_finds(source):
    assert len(faults_of(source)) == 1


def test_the_reader_lets_pass():
    allowed = """
import re, pickle, torch, yaml, subprocess
import numpy as np
try:
    torch.load(path, weights_only=True)
except pickle.UnpicklingError:
    model.eval()
np.load(path, allow_pickle=False)
class Own(yaml.SafeLoader):
    pass
yaml.safe_load(text), yaml.load(text, Own), re.compile(text), subprocess.run(["ls"])
UNet2DModel.from_pretrained(folder, use_safetensors=True), DDIMScheduler.from_pretrained(folder)
AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
"""
    assert faults_of(allowed) == []


def test_no_source_does():
    files = [ROOT / "train_continual.py", *(ROOT / "diffusers_cl").glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert len(files) > 40
    found = {str(file.relative_to(ROOT)): faults_of(file.read_text()) for file in files}
    assert {file: faults for file, faults in found.items() if faults} == {}


def is_pickle(file: Path) -> bool:
    """Whether unpickling a file, as it is or as `torch.load` does, would get to the end of a pickle."""
    if zipfile.is_zipfile(file):
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(file).namelist())
    with open(file, "rb") as content, warnings.catch_warnings(action="ignore"):
        try:
            return any(code.name == "STOP" for code, *_ in pickletools.genops(content))
        except (ValueError, UnicodeDecodeError):
            return False


def test_pickles_are_known(tmp_path):
    tensors, file = {"weight": torch.zeros(2)}, tmp_path / "file"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"a": [1, 2.0, "b"]}, protocol=protocol))
        assert is_pickle(file)
    for as_zip in (True, False):
        torch.save(tensors, file, _use_new_zipfile_serialization=as_zip)
        assert is_pickle(file)
    for content in (save(tensors), json.dumps([1]).encode(), b"", b"\x89PNG\r\n", b"key: value\n"):
        file.write_bytes(content)
        assert not is_pickle(file)


def test_no_file_of_a_run_is_a_pickle(tmp_path_factory):
    files = [path for path in finished_run(tmp_path_factory, "plain").rglob("*") if path.is_file()]
    # Weights, moments, penalty, references, states, images, plots.
    assert {".safetensors", ".json", ".png", ".yaml", ".jsonl"} <= {file.suffix for file in files}
    assert [file for file in files if is_pickle(file)] == []

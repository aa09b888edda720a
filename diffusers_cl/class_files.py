"""Single classes of an adapted model: the file of one, from a model or a repo, and a repo for one alone."""

import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, constants
from safetensors import SafetensorError

from .adapters import ADAPTERS, has_adapters, read_adapters
from .errors import CheckpointError, ConfigError, first_line
from .fetch import model_folder
from .files import file_sha256, read_json, replacing
from .filters import read_class
from .markup import code_span, plain
from .shards import tensors_digest
from .task_repos import push_files


# In a repo of one class alone.
CLASS_NAME = "class.safetensors"
FILES = re.compile(
    rf"model_index\.json|{re.escape(CLASS_NAME)}|{ADAPTERS}/(config\.json|diffusion_pytorch_model\.safetensors)"
)


def _about(path: Path) -> dict:
    try:
        return read_class(path)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def fetch_class(
    model: str | Path,
    class_label: int | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """
    Returns the file of one class, which [`add_class`] takes: from a repo that [`push_class`] made, or out of the adapters of a model,
    of which nothing else is fetched. Nothing is unpickled or run.

    Args:
        model (`str`): a model's folder or repo, or that of one class.
        class_label (`int` or `str`, *optional*): of the model's classes, an id or a name; a class alone needs none.
        revision, token, cache_dir (`str`, *optional*): as in [`fetch_task`].

    Raises:
        ConfigError: when the model has no such class, or none with adapters.
        CheckpointError, DataError: when the file is damaged, or cannot be fetched.
    """
    folder, _ = model_folder(model, revision, FILES, token, cache_dir)
    if (folder / CLASS_NAME).exists():
        _about(folder / CLASS_NAME)
        return folder / CLASS_NAME
    index = folder / "model_index.json"
    known = read_json(index).get("id2label") if index.exists() else None
    known = {
        class_id: name
        for class_id, name in (known if isinstance(known, dict) else {}).items()
        if isinstance(name, str)
    }
    ids = {name: class_id for class_id, name in known.items()}
    # As everywhere: text is a name, a number an id.
    class_id = ids.get(class_label) if isinstance(class_label, str) else str(class_label)
    if class_id not in known:
        raise ConfigError(f"{model} has no class {class_label!r}; it has {', '.join(map(repr, ids)) or 'none'}")
    if not has_adapters(folder):
        raise ConfigError(f"{model} has no adapters, for no class")
    adapters = read_adapters(folder / ADAPTERS)
    if int(class_id) not in adapters.class_ids:
        raise ConfigError(f"{model}: the class {class_label!r} has no adapters")
    about = [adapters.config.base, class_id, adapters.config.names[class_id]]
    digest = tensors_digest(adapters.classes[class_id].state_dict(), about)
    path = Path(cache_dir or constants.HF_HOME) / "diffusers_cl" / f"class-{digest[:16]}.safetensors"
    with replacing(path) as own:
        adapters.save_class(int(class_id), own)
    return path


def push_class(
    path: str | Path, repo_id: str, token: str | None = None, private: bool | None = None
) -> dict[str, str]:
    """
    Pushes the file of one class to a repo of its own, with a card that says what it belongs to, as one commit.

    Args:
        path (`Path`): the file, from [`fetch_class`] or [`FunLoRA.save_class`].
        repo_id (`str`): with its namespace; made where it is missing.
        token (`str`, *optional*): by default `HF_TOKEN`, or the one that is saved on this machine.
        private (`bool`, *optional*): for a new repo.

    Returns:
        `dict`: `"repo_id"`, `"commit"` and `"url"`.

    Raises:
        CheckpointError: when it is no file of a class; nothing is sent.
        ConfigError, DataError: as [`push_task_folder`].
    """
    about = _about(Path(path))
    name = plain(about["name"] or str(about["class_id"]))
    text = [
        f"# {name}: one class of an adapted diffusion model",
        "",
        f"The adapters of {code_span(name)} (FunLoRA, arXiv 2510.02631; {plain(str(about.get('function')))}), for the frozen network"
        f" whose weights have the sha256 `{plain(str(about.get('base')))[:16]}...`, and for no other.",
        "",
        "```python",
        "from diffusers_cl import add_class, fetch_class, load_pipeline",
        "",
        'pipe = load_pipeline("path/to/a/model/of/that/network")',
        f'add_class(pipe, fetch_class("{repo_id}"))',
        "```",
    ]
    data = ModelCardData(library_name="diffusers", tags=["diffusers-cl", "continual-learning", "funlora"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(path, folder / CLASS_NAME)
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n").save(folder / "README.md")
        sums = {file.name: file_sha256(file) for file in folder.iterdir()}
        return push_files(folder, sums, repo_id, f"Add the class {name}", token=token, private=private)

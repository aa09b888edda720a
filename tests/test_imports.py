"""What each module may import (DESIGN.md), read from the import statements; and what `import diffusers_cl` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_cl


PACKAGE = Path(diffusers_cl.__file__).parent
ROOT = PACKAGE.parent

# Beside the standard library. A leading dot is a module of this package.
ALLOWED = {
    "__init__": set(),
    "losses": {"torch"},
    "passes": {"torch"},
    "along": {"torch", ".passes"},
    "fisher": {"torch", ".along", ".passes"},
    "strength": set(),
    "quadratic": {"torch"},
    "ewc": {"torch", "safetensors", ".fisher", ".passes", ".quadratic", ".strength"},
    "lowrank": {"torch", ".along", ".ewc", ".fisher", ".passes"},
    "controls": {"torch", ".along", ".ewc", ".fisher", ".passes"},
    "starvation": {"torch", ".fisher"},
    "gram": {"torch", ".passes"},
    "gauss_newton": {"torch", ".passes"},
    "movement": {"torch", ".passes"},
    "bands": {"torch", "safetensors", ".fisher", ".passes"},
    "replay": {"torch"},
    "pipeline": {"torch", "diffusers"},
    "filters": {"torch", "safetensors"},
    "funlora": {"torch", "diffusers", "safetensors", ".filters"},
    "metrics": {"torch", "numpy", ".randomness", "torch_fidelity"},
    # Those above are as light as what they import.
    "randomness": {"torch"},
    # A model is pushed beside the training, in a process that loads no torch.
    "files": {"safetensors", ".errors"},
    "folders": {".errors", ".files"},
    "endpoint": {"huggingface_hub", ".errors"},
    "task_repos": {"huggingface_hub", ".endpoint", ".errors", ".files", ".folders"},
    "publish": {"huggingface_hub", ".endpoint", ".errors", ".files", ".folders", ".task_repos"},
}
# Heavy: only inside functions.
INSIDE_FUNCTIONS = {"metrics": {"torch_fidelity"}}


def imports_of(source: str, at_import_only: bool = False) -> set[str]:
    """
    Returns what a module of the package imports: top-level names, and `.name` for its neighbours. `at_import_only`
    leaves out what is inside functions.
    """
    found = set()

    def visit(node: ast.AST) -> None:
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from package import module`, too.
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "the package has no sub-packages"
            names = [f"diffusers_cl.{node.module or alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names = [ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "dynamic"]
        else:
            names = []
        for name in names:
            top, _, rest = name.partition(".")
            if top == "diffusers_cl" and rest and (PACKAGE / f"{rest.split('.')[0]}.py").exists():
                found.add(f".{rest.split('.')[0]}")
            elif top != "diffusers_cl":
                found.add(top)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found - sys.stdlib_module_names


def module_sources() -> dict[str, str]:
    sources = {path.stem: path.read_text() for path in PACKAGE.glob("*.py")}
    assert sources.keys() >= ALLOWED.keys(), "a module of the rule is missing"
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE], "modules in sub-packages"
    return sources


@pytest.mark.parametrize(
    ("source", "everywhere", "at_import"),
    [
        ("import torch.nn as nn, os", {"torch"}, {"torch"}),
        ("from torch_fidelity.metric_fid import x", {"torch_fidelity"}, {"torch_fidelity"}),
        ("def f():\n    import numpy\n", {"numpy"}, set()),
        ("class A:\n    import numpy\n    def f(self):\n        from PIL import Image", {"numpy", "PIL"}, {"numpy"}),
        ("if True:\n    try:\n        import numpy\n    except ImportError: pass", {"numpy"}, {"numpy"}),
        ("from .fisher import mean_gradient", {".fisher"}, {".fisher"}),
        ("from . import fisher, ewc", {".fisher", ".ewc"}, {".fisher", ".ewc"}),
        ("from diffusers_cl.fisher import mean_gradient", {".fisher"}, {".fisher"}),
        ("import diffusers_cl.fisher", {".fisher"}, {".fisher"}),
        ("from diffusers_cl import fisher", {".fisher"}, {".fisher"}),
        ("import importlib\nx = importlib.import_module('yaml')", {"yaml"}, {"yaml"}),
        ("import train_continual, scripts.sample", {"train_continual", "scripts"}, {"train_continual", "scripts"}),
    ],
)
def test_the_reader_of_import_statements(source, everywhere, at_import):
    assert imports_of(source) == everywhere
    assert imports_of(source, at_import_only=True) == at_import


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_what_the_design_allows(module):
    source = module_sources()[module]
    if module == "__init__":
        # Its one dynamic import is the lazy one of the public names.
        assert imports_of(source) == {"dynamic"}
        assert imports_of(source, at_import_only=True) == set()
        return
    assert imports_of(source) <= ALLOWED[module]
    assert not imports_of(source, at_import_only=True) & INSIDE_FUNCTIONS.get(module, set())


def test_nothing_imports_the_script_or_the_scripts():
    for module, source in module_sources().items():
        names = {"train_continual", "scripts"} | {path.stem for path in (ROOT / "scripts").glob("*.py")}
        assert not imports_of(source) & names, module


def test_only_the_lazy_import_is_dynamic():
    dynamic = {module for module, source in module_sources().items() if "dynamic" in imports_of(source)}
    assert dynamic == {"__init__"}


def in_new_process(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_but_the_standard_library():
    # What site loads in an environment is there before.
    script = "import sys; before = set(sys.modules); import diffusers_cl; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in in_new_process(script).split()}
    assert "diffusers_cl" in loaded and "torch" not in loaded
    assert loaded - {"diffusers_cl"} <= sys.stdlib_module_names


def test_public_names():
    assert set(diffusers_cl.__all__) >= {"ClassConditionalPipeline", "DiagonalEWC", "Rank1EWC", "__version__"}
    for name in diffusers_cl.__all__:
        assert getattr(diffusers_cl, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Ewc'"):
        diffusers_cl.Ewc  # noqa: B018

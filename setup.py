import re
from pathlib import Path

from setuptools import setup


here = Path(__file__).resolve().parent
version = re.search(r'^__version__ = "([^"]+)"', (here / "diffusers_cl" / "__init__.py").read_text("utf-8"), re.M)[1]
readme = here / "README.md"

# A lower bound is the older of the versions on the two machines this is made for: the CPU machine of constraints.txt,
# the pinned set that the Makefile installs and CI tests, and a GPU machine (torch 2.11, torchvision 0.26,
# transformers 5.17, huggingface_hub 1.33). Nothing older was tried.
install_requires = [
    "accelerate>=1.15",
    "datasets>=5.2",
    "diffusers>=0.42",
    # Not jsonargparse[signatures]: dataclasses work without it, and of what it adds only the descriptions that
    # `--help` takes from the docstrings (docstring-parser) are wanted.
    "docstring-parser>=0.18",
    "huggingface_hub>=1.33",
    "jsonargparse>=4.53",
    "matplotlib>=3.11",
    "numpy>=2.4",
    "pillow>=13",
    "psutil>=7.2",
    "pyyaml>=6.0.3",
    "safetensors>=0.8",
    "scikit-learn>=1.9",
    "scipy>=1.17",
    "tensorboard>=2.21",
    "torch>=2.11",
    "torch-fidelity>=0.4.0",
    "torchvision>=0.26",
    "tqdm>=4.70",
    "transformers>=5.17",
]
test = [
    "filelock>=4.2",
    "markdown-it-py>=4.2",
    "peft>=0.21",
    "pytest>=9.2",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
]
quality = ["ruff==0.17.5"]

setup(
    name="diffusers-cl",
    version=version,
    description="Continual learning for Hugging Face diffusers",
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=["diffusers_cl"],
    package_data={"diffusers_cl": ["assets/*.safetensors"]},
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require={"test": test, "quality": quality, "dev": test + quality},
)

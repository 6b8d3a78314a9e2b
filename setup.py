"""Packaging of paci-megatron. Tool settings are in pyproject.toml, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Reads `__version__` from the source: importing the package would need its dependencies."""
    text = (ROOT / "paci_megatron" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise RuntimeError('paci_megatron/__init__.py has no line __version__ = "..."')
    return found.group(1)


# The lower bounds of INSTALL_REQUIRES are the oldest releases that were tried; constraints.txt has the exact set that is
# tested.
# NVIDIA Apex must never be listed: the index has another project under its name. It is used when importable.
INSTALL_REQUIRES = [
    # 2.11 is what the tests run on. The plugin needs autograd's `_unsafe_preserve_version_counter`, which is
    # private but still there in 2.15; a major release is where it may go.
    "torch>=2.11,<3",
    # The plugin replaces functions of `megatron.training` by name, and these change between minor releases.
    "megatron-core>=0.19.2,<0.20",
    # Megatron imports these without requiring them: psutil whenever it saves a checkpoint, sentencepiece and
    # transformers for its SentencePiece, GPT-2 BPE and Hugging Face tokenizers.
    "psutil>=6",
    "sentencepiece>=0.2",
    "transformers>=4.57",
    # Preprocessing, evaluation and the figures.
    "datasets>=4",
    "matplotlib>=3.9",
    "numpy>=2",
    "packaging>=24",
    "pyarrow>=18",
    "tqdm>=4.67",
]

EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]"],
    "tensorboard": ["tensorboard"],
    # setuptools: the packaging test builds a wheel without a network, from what is installed here.
    "dev": ["mypy>=1.15", "pytest>=8.3", "pytest-timeout>=2.3", "ruff>=0.11", "setuptools>=77"],
}

setup(
    name="paci-megatron",
    version=read_version(),
    description="The PACI asynchronous pipeline schedule for Megatron: 1F1B without flushes",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    packages=find_packages(include=["paci_megatron", "paci_megatron.*"]),
    # The entry point is a module, so that `torchrun -m pretrain_gpt_paci` works from any directory.
    py_modules=["pretrain_gpt_paci"],
    # For `torchrun --no-python pretrain_gpt_paci ...`.
    entry_points={"console_scripts": ["pretrain_gpt_paci = pretrain_gpt_paci:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

from pathlib import Path

from setuptools import find_packages, setup

NNI_PLATFORMS = "platform_machine == 'x86_64' or platform_machine == 'AMD64'"
"""NNI has wheels for these alone."""
EXTRAS = {
    "plots": ["matplotlib>=3.9", "jinja2>=3.1"],
    "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "sampling": ["scikit-learn>=1.5"],
    "accelerator": [
        "zigzag-dse>=3.9,<4; python_version >= '3.11'",
        "six>=1.16",  # zigzag-dse needs it and does not declare it
    ],
    "tensorboard": ["tensorboard>=2.18"],
    "energy": ["nvidia-ml-py>=12"],
}
TEST = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "fvcore>=0.1.5",
    "ruff>=0.9",
    "import-linter>=2.17",  # it has contracts on circles
    "mypy>=1.15",
    "playwright>=1.40",
    "types-PyYAML>=6.0",
    "types-requests>=2.31",
]

setup(
    name="nni-haloc",
    version="0.2.0",
    description="Hardware-aware automatic low-rank compression (HALOC) of convolutional networks, "
    "as an NNI plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["nni_haloc", "nni_haloc.*"]),
    package_data={
        "nni_haloc": ["py.typed", "results/templates/*.html", "experiments/patience.cjs"]
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        f"nni==3.0; {NNI_PLATFORMS}",
        "setuptools>=77.0.3,<82",  # nnictl imports pkg_resources, which 82 drops; torch needs 77
        "torch>=2.9",
        "torchvision>=0.24",
        "pytorch_lightning>=2.6",  # 2.5 draws the order of a resumed epoch twice
        "tensorly>=0.9",
        "numpy>=2.0",
        "scipy>=1.13",
        "pyyaml>=6.0",
        "pydantic>=2.7",
        "safetensors>=0.4",
        "typer>=0.19",
    ],
    extras_require={
        **EXTRAS,
        "test": [*TEST, *(package for extra in EXTRAS.values() for package in extra)],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=1.0"],
    },
    entry_points={"console_scripts": ["haloc=nni_haloc.cli.main:main"]},
)

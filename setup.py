import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
HOME = "https://github.com/nni-haloc/nni-haloc"
"""The repository. README's links are relative, so that they lead somewhere in a checkout of any
branch, too; a package index needs them absolute."""


def version() -> str:
    """Read the version where it is written, without importing the package."""
    source = (ROOT / "nni_haloc" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)[1]


def long_description() -> str:
    """Return README.md with links and images that work outside of the repository."""

    def absolute(link: re.Match) -> str:
        is_image, place = link[1].startswith("!"), link[2]
        kind = "raw" if is_image else "blob"
        return f"{link[1]}({HOME}/{kind}/v{version()}/{place})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?\[[^\]]*\])\((?![a-z]+:|#)([^)]+)\)", absolute, text)


NNI_PLATFORMS = "platform_machine == 'x86_64' or platform_machine == 'AMD64'"
"""NNI has wheels for these alone."""
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
TENSORRT = [*ONNX, "tensorrt>=10; platform_machine == 'x86_64'"]
"""It is gigabytes large and of use on NVIDIA devices alone, so tests do without it."""
EXTRAS = {
    "onnx": ONNX,
    "openvino": [*ONNX, "openvino>=2025.0", "nncf>=2.15"],
    "executorch": ["executorch>=1.0"],
    "sampling": ["scikit-learn>=1.5"],
    "accelerator": [
        "zigzag-dse>=3.9,<4; python_version >= '3.11'",
        "six>=1.16",  # zigzag-dse needs it and does not declare it
    ],
    "tensorboard": ["tensorboard>=2.18"],
    "mlflow": ["mlflow>=3.0"],
    "wandb": ["wandb>=0.19"],
    "energy": ["nvidia-ml-py>=12"],
    "hub": ["huggingface_hub>=2.0"],
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
    "build>=1.2",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "types-PyYAML>=6.0",
    "types-requests>=2.31",
]

setup(
    name="nni-haloc",
    version=version(),
    description="Hardware-aware automatic low-rank compression (HALOC) of convolutional networks, "
    "as an NNI plugin",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/main/docs",
        "Changes": f"{HOME}/blob/main/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    },
    license="MIT",
    license_files=["LICENSE"],
    keywords=[
        "model compression",
        "low-rank",
        "Tucker decomposition",
        "rank selection",
        "hardware-aware",
        "neural architecture search",
        "NNI",
        "PyTorch",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
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
        "matplotlib>=3.9",
        "jinja2>=3.1",
    ],
    extras_require={
        **EXTRAS,
        "tensorrt": TENSORRT,
        "test": [*TEST, *(package for extra in EXTRAS.values() for package in extra)],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=1.0", "mkdocs-jupyter>=0.25"],
    },
    entry_points={"console_scripts": ["haloc=nni_haloc.cli.main:main"]},
)

"""Write class folders of random images, to try ImageNet's recipes.

    python tests/benchmarks/synthetic_images.py OUT

Each class has a colour and a grating of its own, with noise, so that there is something to learn.
The layout is `root/train/CLASS`, `root/val/CLASS`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image


def main(
    out: Path,
    classes: Annotated[int, typer.Option(help="number of classes")] = 12,
    train: Annotated[int, typer.Option(help="training images of each")] = 40,
    val: Annotated[int, typer.Option(help="other images of each")] = 10,
    size: Annotated[int, typer.Option(help="pixels along an edge")] = 256,
) -> None:
    random = np.random.default_rng(0)
    across = np.arange(size)
    for name in range(classes):
        colour, frequency, angle = (
            random.uniform(60, 200, 3),
            random.uniform(0.05, 0.5),
            random.uniform(0, np.pi),
        )
        for part, number in (("train", train), ("val", val)):
            folder = out / part / f"class{name:02}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                phase = frequency * (
                    np.cos(angle) * across[:, None] + np.sin(angle) * across
                ) + random.uniform(0, 2 * np.pi)
                image = (
                    colour + 50 * np.sin(phase)[..., None] + random.normal(0, 30, (size, size, 3))
                )
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.jpeg")
    print(f"{out}: {classes} classes of {train} and {val} images")


if __name__ == "__main__":
    typer.run(main)

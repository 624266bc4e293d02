"""Compress the trained network of this folder to 30 % of its MACs: Python alone, no settings.

About ten seconds of one core. It prints the original network beside the compressed one (top-1 on
the validation images), then the top-1 of both on the 360 test images, and leaves the compressed
network in the folder `compressed`.
"""

from pathlib import Path

import torch

from nni_haloc import accuracy, compress_model
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights

if __name__ == "__main__":
    torch.set_num_threads(1)  # the network is too small to share out among processors
    model = build_model("digits_cnn")
    load_weights(model, Path(__file__).with_name("digits.safetensors"))
    data = digits()
    train_loader = data.loader("train", 64, shuffle=True)
    val_loader = data.loader("val", 64)
    result = compress_model(model, train_loader, val_loader, budget=0.3, metric="macs")
    print(result.report())
    for name, network in {"original": model, "compressed": result.model}.items():
        print(f"{name}: {accuracy(network, data.loader('test', 360))[0]:.2%} of the test images")
    result.save("compressed")

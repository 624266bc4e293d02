"""The search with nested candidates: exact gates for every pair of ranks, and the whole of it."""


import pytest
import torch
from torch import nn

from nni_haloc.search.gates import contract_nested, gate_gradients
from nni_haloc.space.candidates import build_nested_candidates
from nni_haloc.space.ranks import AllowedRanks, find_layers

EVERY = AllowedRanks(step=2, equal=False, kinds=("conv", "pointwise", "linear"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
        (nn.Conv2d(6, 8, 3, padding=2, padding_mode="circular", bias=False), (4, 6, 9, 9)),
        (nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
        (nn.Linear(6, 8), (4, 3, 6)),
    ],
)
def test_gates_of_every_pair_of_ranks_are_those_of_running_every_candidate(layer, shape):
    torch.manual_seed(0)
    layer, x = layer.double(), torch.randn(*shape, dtype=torch.float64)
    net = nn.Sequential(layer)
    layers = find_layers(net, x, EVERY)
    rows = layers.candidates(EVERY)
    candidates = list(build_nested_candidates(net, layers.specs, rows, x)["0"].values())
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
        assert len(candidates) > 8
    grad_y = torch.randn_like(layer(x))
    expected = torch.stack([(candidate(x) * grad_y).sum() for candidate in candidates])
    found = gate_gradients(layers.specs["0"], candidates, x, grad_y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_one_contraction_gives_every_leading_block():
    torch.manual_seed(0)
    out, core, inn = torch.randn(5, 4), torch.randn(4, 3, 3, 3), torch.randn(3, 6)
    g = torch.randn(5, 6, 3, 3)
    corners = torch.tensor([[r1, r2] for r1 in range(4) for r2 in range(3)])
    found = contract_nested(g, (out, core, inn), corners)
    for (i, j), value in zip(corners.tolist(), found, strict=True):
        kernel = torch.einsum(
            "fr,rsij,sc->fcij", out[:, : i + 1], core[: i + 1, : j + 1], inn[: j + 1]
        )
        torch.testing.assert_close(value, (g * kernel).sum(), rtol=1e-4, atol=1e-4)

"""Recalibration, fine-tuning and accuracy against what they should compute."""

import copy

import pytest
import torch
from helpers.paths import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc.inputs.config import load_config
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged


def test_recalibration_is_the_plain_mean_over_the_batches(net, loaders):
    net.train()
    weights = copy.deepcopy(list(net.parameters()))
    batches = [x for x, _ in DataLoader(loaders[0].dataset, 16)]
    recalibrate(net, DataLoader(loaders[0].dataset, 16), 3)
    outputs = [net.stem(x).detach() for x in batches[:3]]
    torch.testing.assert_close(
        net.norm.running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    )
    torch.testing.assert_close(
        net.norm.running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    )
    assert net.norm.momentum == 0.1
    assert net.norm.training
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_a_network_without_batch_norm_is_left_alone(loaders):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    recalibrate(model, loaders[0])


def test_accuracy_counts():
    labels = torch.tensor([0, 1, 2, 2, 5])
    logits = torch.eye(6)[torch.tensor([0, 1, 2, 1, 0])] * 3 + torch.eye(6)[labels]
    loader = DataLoader(TensorDataset(logits, labels), 2)
    model = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(6))
    assert accuracy(model, loader, (1, 2)) == pytest.approx((0.6, 1.0))


def test_fine_tuning_learns_and_reports_every_epoch(net, loaders):
    seen = []
    val = DataLoader(loaders[1].dataset, 16)
    finetune(
        net,
        loaders[0],
        Recipe(3, 0.05),
        val,
        lambda epoch, m: seen.append((epoch, m)),
        enable_progress_bar=False,
    )
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert all({"train_loss", "val_top1"} <= set(m) for _, m in seen)
    assert seen[-1][1]["train_loss"] < seen[0][1]["train_loss"]
    assert seen[-1][1]["val_top1"] == pytest.approx(accuracy(net, val)[0])
    assert not net.training


def test_no_epochs_is_no_training(net, loaders):
    before = copy.deepcopy(net.state_dict())
    finetune(net, loaders[0], Recipe(0))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_papers_recipe_is_scaled_to_the_epochs():
    """The paper: 0.1, times 0.2 every 55 epochs; at 8 epochs, every 2."""
    conf = Recipe(8).optimizers([nn.Parameter(torch.zeros(1))], steps_per_epoch=10)
    optimizer, scheduler = conf["optimizer"], conf["lr_scheduler"]["scheduler"]
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    rates = []
    for _ in range(80):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[::20] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert rates[19] == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_distillation_descends_the_softened_divergence_from_the_original(share):
    """One step of plain gradient descent, against the definition written out in float64."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Linear(6, 4).double(),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).double(),
    )
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    w = student.weight.detach().clone().requires_grad_()
    logits, target = x @ w.T + student.bias.detach(), teacher[1](x).detach()
    p, q = (torch.exp(z / 4) / torch.exp(z / 4).sum(1, keepdim=True) for z in (target, logits))
    entropy = -torch.log(torch.exp(logits)[range(8), y] / torch.exp(logits).sum(1)).mean()
    ((1 - share) * entropy + share * 16 * (p * torch.log(p / q)).sum(1).mean()).backward()
    recipe = Recipe(1, 0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    before = copy.deepcopy(teacher.state_dict())
    data = DataLoader(TensorDataset(x, y), 8)
    finetune(
        student,
        data,
        recipe,
        teacher=teacher,
        distill=share,
        precision="64-true",
        enable_progress_bar=False,
    )
    torch.testing.assert_close(student.weight.detach(), (w - 0.1 * w.grad).detach())
    assert teacher.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), teacher.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_feature_maps_are_drawn_to_the_originals_as_in_equation_9(share):
    """One step of plain gradient descent, against the definition written out.

    An activation writes into the outputs that are compared.
    """
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).double()
        for _ in range(2)
    )
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    w1, w2 = (student[i].weight.detach().clone().requires_grad_() for i in (0, 2))
    first = x @ w1.T + student[0].bias.detach()
    logits = first.clamp_min(0) @ w2.T + student[2].bias.detach()
    first_target = teacher[0](x).detach()
    target = teacher[2](first_target.clamp_min(0)).detach()
    entropy = -torch.log(torch.exp(logits)[range(8), y] / torch.exp(logits).sum(1)).mean()
    p, q = (torch.exp(z / 4) / torch.exp(z / 4).sum(1, keepdim=True) for z in (target, logits))
    loss = (1 - share) * entropy + share * 16 * (p * torch.log(p / q)).sum(1).mean()
    (
        loss + 0.7 * ((first - first_target) ** 2).mean() + 0.7 * ((logits - target) ** 2).mean()
    ).backward()
    recipe = Recipe(1, 0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    options = {"teacher": teacher, "distill": share, "layers": ["0", "2"], "feature_weight": 0.7}
    finetune(
        student,
        DataLoader(TensorDataset(x, y), 8),
        recipe,
        **options,
        precision="64-true",
        enable_progress_bar=False,
    )
    for w, layer in ((w1, student[0]), (w2, student[2])):
        torch.testing.assert_close(layer.weight.detach(), (w - 0.1 * w.grad).detach())
    assert not any(module._forward_hooks for module in [*student, *teacher])


def test_no_batches_of_recalibration_leave_the_statistics_alone(net, loaders):
    before = copy.deepcopy(net.state_dict())
    recalibrate(net, loaders[0], 0)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_network_that_is_measured_in_channels_last_is_trained_in_it(tmp_path):
    example = ROOT / "examples" / "digits" / "run.yml"
    job = Job(
        load_config(example, {"cost.memory_format": "channels_last", "rule": "uniform"}), tmp_path
    )
    network = ChooseRanks().run(job, None, ignore, resume=False).network
    kernels = [
        m.weight
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1 and m.kernel_size > (1, 1)
    ]
    assert len(kernels) == 3  # the fourth has one input channel
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize(("weight", "found"), [(float("nan"), "nan"), (1e38, "inf|nan")])
def test_a_loss_that_is_not_finite_ends_the_training(net, loaders, weight, found):
    with torch.no_grad():
        net.head.weight.fill_(weight)
    with pytest.raises(
        Diverged,
        match=rf"the training diverged: loss ({found}) in epoch 1, iteration 1; "
        "lower its learning rate$",
    ):
        finetune(net, loaders[0], Recipe(1, 0.01), enable_progress_bar=False)


def test_weights_that_the_last_step_made_infinite_are_no_result(net, images, labels):
    data = DataLoader(TensorDataset(images, labels), 64)
    with pytest.raises(
        Diverged,
        match=r"the training diverged: .* is no longer finite; lower its learning rate$",
    ):
        finetune(
            net,
            data,
            Recipe(1, 1e38, weight_decay=1e3, schedule="constant"),
            enable_progress_bar=False,
        )

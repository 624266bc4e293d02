"""`haloc spec`, `measure` and `predict`; on a device without NNI: ``python -m nni_haloc.costs.measure --spec spec.json``.

What a device needs is numpy and pyyaml, and PyTorch or ONNX Runtime; everything else is imported where a model is at hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nni_haloc.costs.device.measurements import keep_measurements, merge
from nni_haloc.costs.device.measuring import Runtime, Timing, measure
from nni_haloc.costs.device.spec import Specification, draw, share
from nni_haloc.utils.errors import first_line, reason_of
from nni_haloc.utils.files import write_json
from nni_haloc.utils.interruption import stoppable
from nni_haloc.utils.progress import progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nni_haloc.space.ranks import RankRules


def spec_main(arguments: Sequence[str] | None = None) -> None:
    """Write a specification from a model: what another machine measures without it."""
    parser = Parser(
        "haloc spec",
        "Write what a device has to measure, without model or weights, for `haloc measure --spec`.",
    )
    parser.model_options("spec.json")
    parser.add_argument(
        "--onnx", action="store_true", help="carry ONNX models too, for devices with ONNX Runtime"
    )
    options = parser.parse_args(arguments)
    spec, _ = _specified(options, options.onnx)
    spec.save(options.out)
    print(f"{options.out}: {len(spec.layers)} layers, {len(spec.entries)} entries to measure")


def measure_main(arguments: Sequence[str] | None = None) -> int:
    """Measure every entry of a model's rank space, or of a specification, on this device; returns how many are measured."""
    parser = Parser(
        "haloc measure",
        "Measure what every candidate of every layer costs on this device. Goes on where it was stopped.",
    )
    parser.add_argument(
        "--spec",
        type=Path,
        help="what to measure, as `haloc spec` wrote it, in the place of --model",
    )
    parser.model_options("costs.json")
    parser.add_argument("--runtime", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument(
        "--device",
        default="cpu",
        help="torch's name of it: cpu, cuda, cuda:1, mps (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), default="contiguous"
    )
    parser.add_argument("--threads", type=int, help="processor threads (default: the runtime's)")
    parser.add_argument(
        "--where",
        choices=("alone", "in-place"),
        default=Timing.where,
        help="a layer by itself, or in the network",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=Timing.rounds,
        help="passes over all entries (default: %(default)s)",
    )
    parser.add_argument(
        "--min-run-time",
        type=float,
        default=Timing.min_run_time,
        help="seconds for an entry in a pass (%(default)s)",
    )
    parser.add_argument(
        "--sample",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="measure a share of the entries, predict the others",
    )
    parser.add_argument(
        "--part", default="0/1", help="what one of several workers measures: 0/4 to 3/4"
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="put the workers' files together, measure nothing",
    )
    options = parser.parse_args(arguments)
    spec, model = _specified(options, options.runtime == "onnxruntime")
    if options.merge:
        keep_measurements(options.out)
        content = merge(spec, options.merge)
    else:
        timing = Timing(options.where, options.rounds, options.min_run_time)
        if options.sample != 1:
            from nni_haloc.costs.regression import complete

            if options.where != "alone" or options.part != "0/1":
                raise ValueError(
                    "--sample: the entries of a sample are measured alone, by one worker; found --where in-place or --part"
                )
        indices = (
            draw(spec, options.sample) if options.sample != 1 else share(spec, *_part(options.part))
        )
        with stoppable(
            "haloc measure",
            lambda: f"{options.out} keeps what is measured; the same command goes on",
        ):
            content = measure(
                spec, _runtime(options, model), options.out, timing, progress("measured"), indices
            )
        if options.sample != 1:
            content = complete(spec, content)
    write_json(options.out, content)
    print(f"{options.out}: {_summary(content)}")
    return sum(len(row) for row in content["runs"].values())


def predict_main(arguments: Sequence[str] | None = None) -> None:
    """Write a cost table that is counted or modelled, not measured."""
    parser = Parser("haloc predict", "Count or model what every candidate of every layer costs.")
    parser.add_argument("--predictor", choices=("analytic", "eyeriss", "roofline"), required=True)
    parser.add_argument(
        "--metric",
        help="macs, params or activation_bytes (analytic); cycles or energy_pj (eyeriss)",
    )
    parser.model_options("costs.json")
    parser.add_argument(
        "--flops",
        type=float,
        help="roofline: floating-point operations a second (default: measured here)",
    )
    parser.add_argument(
        "--bandwidth", type=float, help="roofline: bytes a second (default: measured here)"
    )
    options = parser.parse_args(arguments)
    metrics = {
        "analytic": ("macs", "params", "activation_bytes"),
        "eyeriss": ("cycles", "energy_pj"),
        "roofline": ("latency_ms",),
    }
    metric = options.metric or metrics[options.predictor][0]
    if metric not in metrics[options.predictor]:
        raise ValueError(
            f"--metric: {options.predictor} gives {' or '.join(metrics[options.predictor])}, found {metric!r}"
        )
    if any(rate is not None and rate <= 0 for rate in (options.flops, options.bandwidth)):
        raise ValueError("--flops, --bandwidth: expected numbers above 0")
    model, example, rules = model_of(options)
    from nni_haloc.costs import analytic
    from nni_haloc.costs.accelerator import CACHE, accelerator_table

    if options.predictor == "eyeriss":
        table = accelerator_table(
            model, example, rules, metric, cache=CACHE, progress=progress("modelled")
        )
    elif options.predictor == "roofline":
        known = options.flops and options.bandwidth
        flops, bandwidth = (0.0, 0.0) if known else analytic.measure_peaks()
        rates = {"flops": options.flops or flops, "bandwidth": options.bandwidth or bandwidth}
        table = analytic.roofline_table(model, example, rules, **rates)
    else:
        counted = {
            "macs": analytic.mac_table,
            "params": analytic.param_table,
            "activation_bytes": analytic.activation_table,
        }
        table = counted[metric](model, example, rules)
    keep_measurements(options.out)
    table.save(options.out)
    print(f"{options.out}: the network costs {table.original:.6g} {metric}")


class Parser(argparse.ArgumentParser):
    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, description=text, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def model_options(self, out: str | None) -> None:
        self.add_argument(
            "--model", help="resnet20, torchvision:resnet18, your_package.models:make_net, ..."
        )
        self.add_argument("--input", help="shape of one image or other input: 3x224x224, 128")
        self.add_argument("--batch", type=int, help="images in a batch (default: 1)")
        self.add_argument(
            "--rank-space", type=Path, help="which layers and ranks: a file as in search_spaces/"
        )
        if out is not None:
            self.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")


def _specified(options: argparse.Namespace, onnx: bool) -> tuple[Specification, nn.Module | None]:
    """The specification that the options name, and the model where they name one."""
    if getattr(options, "spec", None) is None:
        model, example, rules = model_of(options)
        from nni_haloc.costs.specification import specify

        spec = specify(model, example, rules, options.model)
        if onnx:
            from nni_haloc.costs.device.onnx_models import with_onnx

            spec = with_onnx(spec, model)
        return spec, model
    given = [
        name
        for name in ("model", "input", "batch", "rank_space")
        if getattr(options, name) is not None
    ]
    if given:
        raise ValueError(
            f"--spec and --{given[0].replace('_', '-')}: expected one of the two; a specification says what is measured"
        )
    if not options.spec.exists():
        raise ValueError(f"--spec: no such file: {options.spec}")
    return Specification.load(options.spec), None


def model_of(options: argparse.Namespace) -> tuple[nn.Module, Tensor, RankRules]:
    """The model, a batch and the rules of the rank space that the options name."""
    if options.model is None or options.input is None:
        raise ValueError(
            "--model and --input: expected both, such as --model torchvision:resnet18 --input 3x224x224"
        )
    import torch

    from nni_haloc.space.ranks import RankRules

    options.batch = 1 if options.batch is None else options.batch
    sizes = options.input.split("x")
    if not all(n.isdecimal() and int(n) > 0 for n in sizes) or options.batch < 1:
        raise ValueError(
            f"--input, --batch: expected 3x224x224, 128 or so and a number above 0, found {options.input!r}, {options.batch}"
        )
    rules = RankRules()
    if options.rank_space is not None:
        from nni_haloc.costs.from_settings import rank_rules
        from nni_haloc.inputs.config import load_space

        rules = rank_rules(load_space(options.rank_space))
    model = named_model(options.model)
    try:
        example = torch.randn(options.batch, *(int(n) for n in sizes))
        with torch.no_grad():
            model(example)
    except Exception as error:  # of the model's own code
        raise ValueError(
            f"--input: {options.model} does not take {options.input} ({first_line(error)})"
        ) from None
    return model, example, rules


def named_model(name: str) -> nn.Module:
    """A network by its name, in evaluation mode; where it is a factory, that may lie in the current folder."""
    from nni_haloc.inputs.models import build_model

    sys.path.insert(0, "")
    return build_model(name).eval()


def _runtime(options: argparse.Namespace, model: nn.Module | None) -> Runtime:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads: expected a number above 0, found {options.threads}")
    if options.runtime == "torch":
        from nni_haloc.costs.device.torch_runtime import TorchRuntime

        return TorchRuntime(
            options.device, options.dtype, options.memory_format, options.threads, model
        )
    if (options.device, options.dtype, options.memory_format) != ("cpu", "float32", "contiguous"):
        raise ValueError(
            "--runtime onnxruntime: runs on the processor in float32, without --device, --dtype and --memory-format"
        )
    from nni_haloc.costs.device.onnx_runtime import OnnxRuntime

    return OnnxRuntime(options.threads)


def _part(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise ValueError(f"--part: expected 0/4 to 3/4 or the like, found {text!r}")
    return int(first), int(of)


def _summary(content: dict[str, Any]) -> str:
    if "costs" not in content:
        return "this worker's share is measured; `haloc measure --merge` makes the table"
    spread = sorted(value for row in content["spread"].values() for value in row.values())
    return f"the network takes {content['original']:.4g} ms; median spread of an entry {100 * spread[len(spread) // 2]:.1f} %"


def main() -> None:
    """Entry point on a device: an error that the user can mend is one line, with exit status 2."""
    try:
        measure_main()
    except (ValueError, OSError) as error:
        print(f"haloc measure: {reason_of(error)}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(
            f"haloc measure: needs the package {error.name}, which is not installed",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()

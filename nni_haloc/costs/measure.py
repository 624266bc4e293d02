"""The command ``haloc measure``.

On a device without NNI it is ``python -m nni_haloc.costs.measure --spec spec.json``.

A device needs numpy and pyyaml, and PyTorch or ONNX Runtime; everything else is imported only for
a model that is named. `predicted_table` and `specification` are the logic of ``haloc predict`` and
``haloc spec``.
"""

from __future__ import annotations

import argparse
import json
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

    from nni_haloc.costs.table import CostTable
    from nni_haloc.space.ranks import RankRules


def measure_parser() -> Parser:
    """Return the options of ``haloc measure``: argparse's, because a device may have no typer."""
    parser = Parser(
        "haloc measure",
        "Measure what every candidate of every layer costs on this device. "
        "Started again, it goes on where it was stopped.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="Network: resnet20, torchvision:resnet18, package.module:factory, ...",
    )
    add("--input", metavar="SHAPE", help="Shape of one image or other input: 3x224x224, 128.")
    add("--batch", type=int, metavar="N", help="Images in a batch (default: 1).")
    add(
        "--rank-space",
        type=Path,
        metavar="FILE",
        help="File of the rank space, as in search_spaces/ (default: every convolution).",
    )
    add(
        "--spec",
        type=Path,
        metavar="FILE",
        help="What haloc spec wrote, instead of the four options above.",
    )
    add("--out", type=Path, metavar="FILE", default=Path("costs.json"), help="The cost table.")
    add(
        "--runtime",
        choices=("torch", "onnxruntime"),
        metavar="NAME",
        default="torch",
        help="What runs the layers: torch or onnxruntime.",
    )
    add(
        "--device",
        metavar="NAME",
        default="cpu",
        help="Torch's name of the device: cpu, cuda, cuda:1, mps.",
    )
    add("--dtype", metavar="NAME", default="float32", help="Number format: float32, float16, ...")
    add(
        "--memory-format",
        choices=("contiguous", "channels_last"),
        metavar="NAME",
        default="contiguous",
        help="Layout of the images in memory: contiguous or channels_last.",
    )
    add("--threads", type=int, metavar="N", help="Processor threads (default: the runtime's).")
    add(
        "--where",
        choices=("alone", "in-place"),
        metavar="PLACE",
        default=Timing.where,
        help="Time layers alone, or in-place: in the network.",
    )
    add("--rounds", type=int, metavar="N", default=Timing.rounds, help="Passes over all entries.")
    add(
        "--min-run-time",
        type=float,
        default=Timing.min_run_time,
        metavar="SECONDS",
        help="Shortest time for which an entry runs in a pass.",
    )
    add(
        "--sample",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="Measure this share of the entries and predict the others.",
    )
    add(
        "--part",
        metavar="PART",
        default="0/1",
        help="One worker's part of the entries: of four, 0/4 to 3/4.",
    )
    add(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Join the workers' files into one table; measure nothing.",
    )
    add("--json", action="store_true", help="Print one JSON object to standard output.")
    return parser


def measure_main(arguments: Sequence[str] | None = None) -> int:
    """Measure every entry of a model's rank space, or of a specification, on this device; returns how many are measured."""
    options = measure_parser().parse_args(arguments)
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
    entries = sum(len(row) for row in content["runs"].values())
    print(
        json.dumps(_facts(options.out, content, entries), indent=2)
        if options.json
        else f"{options.out}: {_summary(content)}"
    )
    return entries


PREDICTED = {
    "analytic": ("macs", "params", "activation_bytes"),
    "eyeriss": ("cycles", "energy_pj"),
    "roofline": ("latency_ms",),
}
"""Predictors and the metrics that each gives, the default one first."""


def predicted_table(
    model: nn.Module,
    example: Tensor,
    rules: RankRules,
    predictor: str,
    metric: str | None = None,
    *,
    flops: float | None = None,
    bandwidth: float | None = None,
) -> CostTable:
    """Return a cost table that is counted or modelled, not measured.

    Args:
        model: the original network.
        example: a batch of its inputs.
        rules: the rank space.
        predictor: a key of `PREDICTED`.
        metric: one of the predictor's (None: its first).
        flops: for the roofline, floating-point operations a second (None: measured here).
        bandwidth: for the roofline, bytes a second (None: measured here).

    Raises:
        ValueError: if the predictor has no such metric, or a rate is not above 0.
    """
    metrics = PREDICTED[predictor]
    metric = metric or metrics[0]
    if metric not in metrics:
        raise ValueError(f"--metric: {predictor} gives {' or '.join(metrics)}, found {metric!r}")
    if any(rate is not None and rate <= 0 for rate in (flops, bandwidth)):
        raise ValueError("--flops, --bandwidth: expected numbers above 0")
    from nni_haloc.costs import analytic
    from nni_haloc.costs.accelerator import CACHE, accelerator_table

    if predictor == "eyeriss":
        return accelerator_table(
            model, example, rules, metric, cache=CACHE, progress=progress("modelled")
        )
    if predictor == "roofline":
        peaks = (0.0, 0.0) if flops and bandwidth else analytic.measure_peaks()
        rates = {"flops": flops or peaks[0], "bandwidth": bandwidth or peaks[1]}
        return analytic.roofline_table(model, example, rules, **rates)
    counted = {
        "macs": analytic.mac_table,
        "params": analytic.param_table,
        "activation_bytes": analytic.activation_table,
    }
    return counted[metric](model, example, rules)


class _Formatter(argparse.HelpFormatter):
    """Show each default, as the other commands do, unless it is None, False or in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} [default: %(default)s]" if shown else action.help


class Parser(argparse.ArgumentParser):
    def __init__(self, name: str, text: str) -> None:
        super().__init__(
            name,
            description=text,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def specification(
    model: nn.Module, example: Tensor, rules: RankRules, name: str, *, onnx: bool = False
) -> Specification:
    """Return what another machine has to measure: neither weights nor code of the model.

    Args:
        model: the original network.
        example: a batch of its inputs.
        rules: the rank space.
        name: name of the network, for messages and tables.
        onnx: also carry each entry as an ONNX model, for devices with ONNX Runtime.
    """
    from nni_haloc.costs.specification import specify

    spec = specify(model, example, rules, name)
    if onnx:
        from nni_haloc.costs.device.onnx_models import with_onnx

        spec = with_onnx(spec, model)
    return spec


def _specified(options: argparse.Namespace, onnx: bool) -> tuple[Specification, nn.Module | None]:
    """The specification that the options name, and the model where they name one."""
    if options.spec is None:
        model, example, rules = model_of(
            options.model, options.input, options.batch, options.rank_space
        )
        return specification(model, example, rules, options.model, onnx=onnx), model
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


def model_of(
    name: str | None, shape: str | None, batch: int | None = None, rank_space: Path | None = None
) -> tuple[nn.Module, Tensor, RankRules]:
    """Return the network of a name, a batch of random inputs, and the rules of its rank space.

    Args:
        name: name of the network, see `nni_haloc.inputs.models.build_model`.
        shape: shape of one image or other input: ``3x224x224``, ``128``.
        batch: images in a batch (None: 1).
        rank_space: file of the rank space (None: that of `RankRules`).

    Raises:
        ValueError: if one of them is missing or does not fit; the message names the option.
    """
    if name is None or shape is None:
        raise ValueError(
            "--model and --input: expected both, such as "
            "--model torchvision:resnet18 --input 3x224x224"
        )
    import torch

    from nni_haloc.space.ranks import RankRules

    batch = 1 if batch is None else batch
    sizes = shape.split("x")
    if not all(n.isdecimal() and int(n) > 0 for n in sizes) or batch < 1:
        raise ValueError(
            "--input, --batch: expected 3x224x224, 128 or so and a number above 0, "
            f"found {shape!r}, {batch}"
        )
    rules = RankRules()
    if rank_space is not None:
        from nni_haloc.costs.from_settings import rank_rules
        from nni_haloc.inputs.config import load_space

        rules = rank_rules(load_space(rank_space))
    model = named_model(name)
    try:
        example = torch.randn(batch, *(int(n) for n in sizes))
        with torch.no_grad():
            model(example)
    except Exception as error:  # of the model's own code
        raise ValueError(f"--input: {name} does not take {shape} ({first_line(error)})") from None
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


def _facts(out: Path, content: dict[str, Any], entries: int) -> dict[str, Any]:
    """What ``--json`` prints: the file, how many entries are measured, and the whole network."""
    facts = {key: content.get(key) for key in ("metric", "unit", "original")}
    return {"file": str(out), "entries": entries, "spread": _spread(content), **facts}


def _spread(content: dict[str, Any]) -> float | None:
    """The median spread of an entry as a share of its cost; None of a worker's share."""
    if "costs" not in content:
        return None
    spread = sorted(value for row in content["spread"].values() for value in row.values())
    return spread[len(spread) // 2]


def _summary(content: dict[str, Any]) -> str:
    spread = _spread(content)
    if spread is None:
        return "this worker's share is measured; `haloc measure --merge` makes the table"
    original = f"the network takes {content['original']:.4g} ms"
    return f"{original}; median spread of an entry {100 * spread:.1f} %"


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

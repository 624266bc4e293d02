"""The command ``haloc measure``.

On a device without NNI it is ``python -m nni_haloc.costs.measure --spec spec.json``.

A device needs numpy, and PyTorch or ONNX Runtime; everything else is imported only for
a model that is named. `predicted_table` and `specification` are the logic of ``haloc predict`` and
``haloc spec``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

from nni_haloc.costs.device.benchmark_logs import measured_by_logs
from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import merge, refuse_to_overwrite
from nni_haloc.costs.device.quality import doubts_about
from nni_haloc.costs.device.runtime import Runtime, Timing, check_threads, make_runtime
from nni_haloc.costs.device.spec import Specification, draw, share
from nni_haloc.utils.errors import first_line, printable, reason_of
from nni_haloc.utils.files import write_json
from nni_haloc.utils.interruption import stoppable
from nni_haloc.utils.log import logger
from nni_haloc.utils.progress import progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nni_haloc.costs.table import CostTable
    from nni_haloc.space.ranks import AllowedRanks


def measure_parser() -> Parser:
    """Return the options of ``haloc measure``: argparse's, because a device may have no typer."""
    parser = Parser(
        "haloc measure",
        "Measure each layer's cost at each rank on this device.\n\n"
        "A command that was stopped goes on where it was when it is started again.",
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
        "--metric",
        choices=tuple(MEASURED),
        metavar="NAME",
        default="latency_ms",
        help="What to measure: latency_ms, or energy_mj on a device or processor that counts it.",
    )
    add(
        "--runtime",
        metavar="NAME",
        default="torch",
        help="What runs the layers: torch, torch-compile, onnxruntime, openvino, executorch, "
        "tensorrt, or one that another package adds.",
    )
    add(
        "--device",
        metavar="NAME",
        default="cpu",
        help="Torch's name of the device: cpu, cuda, cuda:1, mps.",
    )
    add(
        "--dtype",
        metavar="NAME",
        default="float32",
        help="Number format: float32, float16, ...; onnxruntime, openvino, executorch: int8.",
    )
    add(
        "--memory-format",
        choices=("contiguous", "channels_last"),
        metavar="NAME",
        default="contiguous",
        help="Layout of the images in memory: contiguous or channels_last.",
    )
    add("--threads", type=int, metavar="N", help="Processor threads (default: the runtime's).")
    add("--graph", action="store_true", help="On a CUDA device: replay each pass as a CUDA graph.")
    add("--no-tf32", action="store_true", help="On a CUDA device: no TF32 in place of float32.")
    add(
        "--where",
        choices=("alone", "in-place"),
        metavar="PLACE",
        default=Timing.where,
        help="Measure layers alone, or in-place: in the network.",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        default=Timing.rounds,
        help="Passes over all entries; from 3 on, up to 3 N until the error is below 2 %%.",
    )
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
    add(
        "--from-log",
        type=Path,
        nargs="+",
        metavar="LOG",
        help="Read what a benchmark program printed on a device without Python (haloc spec "
        "--models); measure nothing.",
    )
    add("--json", action="store_true", help="Print one JSON object to standard output.")
    return parser


def measure_main(arguments: Sequence[str] | None = None) -> int:
    """Measure every entry of a model's rank space, or of a specification, on this device.

    Returns:
        The number of entries that have been measured.
    """
    options = measure_parser().parse_args(arguments)
    if options.from_log:
        content = _read_from_logs(options)
    else:
        content = _merged(options) if options.merge else _measured(options)
    write_json(options.out, content)
    if "costs" in content:
        metric, costs, fixed = (content[key] for key in ("metric", "costs", "fixed"))
        for doubt in doubts_about(metric, costs, fixed, content["quality"]):
            logger.warning("%s: %s", options.out, doubt)
    entries = sum(len(row) for row in content["runs"].values())
    print(
        json.dumps(_facts(options.out, content, entries), indent=2)
        if options.json
        else f"{options.out}: {_summary(content)}"
    )
    return entries


def _merged(options: argparse.Namespace) -> dict[str, Any]:
    """Join the workers' files that ``--merge`` names."""
    spec, _ = _specified(options)
    refuse_to_overwrite(options.out)
    return merge(spec, options.merge)


_BESIDE_LOGS = ("model", "input", "batch", "rank_space", "spec", "out", "from_log", "json")
"""Options that have a meaning beside ``--from-log``."""


def _read_from_logs(options: argparse.Namespace) -> dict[str, Any]:
    """Read the logs of benchmark programs that ``--from-log`` names."""
    default = measure_parser().parse_args([])
    for name, value in vars(options).items():
        if name not in _BESIDE_LOGS and value != getattr(default, name):
            raise ValueError(
                f"--from-log and --{name.replace('_', '-')}: expected one of the two; "
                "the log says what was measured"
            )
    spec, _ = _specified(options)
    refuse_to_overwrite(options.out)
    return measured_by_logs(spec, options.from_log)


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for."""
    runtime = _runtime(options)
    spec, model = _specified(options)
    if model is not None:
        spec = runtime.prepare(spec, model)
    timing = Timing(options.where, options.rounds, options.min_run_time)
    sampled = options.sample != 1
    if sampled:
        from nni_haloc.costs.regression import check_installed, complete

        check_installed()
        if options.where != "alone" or options.part != "0/1":
            raise ValueError(
                "--sample: the entries of a sample are measured alone, by one worker; "
                "found --where in-place or --part"
            )
    indices = draw(spec, options.sample) if sampled else share(spec, *_part(options.part))
    with stoppable(
        "haloc measure", lambda: f"{options.out} keeps what is measured; the same command goes on"
    ):
        content = measure(
            spec, runtime, options.out, timing, progress("measured"), indices, options.metric
        )
    return complete(spec, content) if sampled else content


GROUPS = {"analytic": ("macs", "params", "activation_bytes"), "eyeriss": ("cycles", "energy_pj")}
"""Names for several predictors of one kind, and their metrics, the default one first."""


def predicted_table(
    model: nn.Module,
    example: Tensor,
    allowed: AllowedRanks,
    predictor: str,
    metric: str | None = None,
    *,
    flops: float | None = None,
    bandwidth: float | None = None,
) -> CostTable:
    """Return a cost table by the predictor of a name.

    Args:
        model: the original network.
        example: a batch of its inputs.
        allowed: the rank space.
        predictor: a name of `nni_haloc.inputs.registries.PREDICTORS`, or a key of `GROUPS`.
        metric: one of the predictor's metrics (None: its first).
        flops: for the roofline, floating-point operations a second (None: measured here).
        bandwidth: for the roofline, bytes a second (None: measured here).

    Raises:
        ValueError: if there is no such predictor, it has no such metric, or a rate is not above 0.
    """
    from nni_haloc.costs.device.torch_runtime import TorchRuntime
    from nni_haloc.costs.predictors import roofline_predictor
    from nni_haloc.inputs.registries import PREDICTORS

    if any(rate is not None and rate <= 0 for rate in (flops, bandwidth)):
        raise ValueError("--flops, --bandwidth: expected numbers above 0")
    group = GROUPS.get(predictor)
    if group is not None:
        metric = metric or group[0]
        maker = PREDICTORS[metric if metric in group else group[0]]
    elif predictor == "roofline":
        maker = roofline_predictor(flops, bandwidth)
    else:
        maker = PREDICTORS[predictor]
    if metric not in (None, maker.metric):
        expected = " or ".join(group or (maker.metric,))
        raise ValueError(f"--metric: {predictor} gives {expected}, found {metric!r}")
    return maker.table(model, example, allowed, TorchRuntime(), progress("modelled"))


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
    model: nn.Module, example: Tensor, allowed: AllowedRanks, name: str, *, onnx: bool = False
) -> Specification:
    """Return what another machine has to measure: neither weights nor code of the model.

    Args:
        model: the original network.
        example: a batch of its inputs.
        allowed: the rank space.
        name: name of the network, for messages and tables.
        onnx: also carry each entry as an ONNX model, for devices with ONNX Runtime.
    """
    from nni_haloc.costs.specify import specify

    spec = specify(model, example, allowed, name)
    if onnx:
        from nni_haloc.costs.device.onnx_models import with_onnx

        spec = with_onnx(spec, model)
    return spec


def _specified(options: argparse.Namespace) -> tuple[Specification, nn.Module | None]:
    """Return the specification that the options name, and the model if they name one."""
    if options.spec is None:
        model, example, allowed = model_of(
            options.model, options.input, options.batch, options.rank_space
        )
        return specification(model, example, allowed, options.model), model
    given = [
        name
        for name in ("model", "input", "batch", "rank_space")
        if getattr(options, name) is not None
    ]
    if given:
        raise ValueError(
            f"--spec and --{given[0].replace('_', '-')}: expected one of the two; "
            "a specification says what is measured"
        )
    if not options.spec.exists():
        raise ValueError(f"--spec: no such file: {options.spec}")
    return Specification.load(options.spec), None


def model_of(
    name: str | None, shape: str | None, batch: int | None = None, rank_space: Path | None = None
) -> tuple[nn.Module, Tensor, AllowedRanks]:
    """Return the network of a name, a batch of random inputs, and the ranks it may have.

    Args:
        name: name of the network, see `nni_haloc.inputs.models.build_model`.
        shape: shape of one image or other input: ``3x224x224``, ``128``.
        batch: images in a batch (None: 1).
        rank_space: file of the rank space (None: that of `AllowedRanks`).

    Raises:
        ValueError: if one of them is missing or does not fit; the message names the option.
    """
    if name is None or shape is None:
        raise ValueError(
            "--model and --input: expected both, such as "
            "--model torchvision:resnet18 --input 3x224x224"
        )
    import torch

    from nni_haloc.space.ranks import AllowedRanks

    batch = 1 if batch is None else batch
    sizes = shape.split("x")
    if not all(n.isdecimal() and int(n) > 0 for n in sizes):
        likely = f"; did you mean {shape.replace(',', 'x')}?" if "," in shape else ""
        raise ValueError(f"--input: expected a shape such as 3x224x224, found {shape!r}{likely}")
    if batch < 1:
        raise ValueError(f"--batch: expected a number above 0, found {batch}")
    allowed = AllowedRanks()
    if rank_space is not None:
        from nni_haloc.costs.from_settings import allowed_ranks
        from nni_haloc.inputs.config import load_space

        allowed = allowed_ranks(load_space(rank_space))
    model = named_model(name)
    try:
        example = torch.randn(batch, *(int(n) for n in sizes))
        with torch.no_grad():
            model(example)
    except Exception as error:  # of the model's own code
        raise ValueError(f"--input: {name} does not take {shape} ({first_line(error)})") from None
    return model, example, allowed


def named_model(name: str) -> nn.Module:
    """Build a network by its name, in evaluation mode.

    If the name is a factory, it may lie in the current folder.
    """
    from nni_haloc.inputs.models import add_code, build_model, is_factory

    if is_factory(name):
        add_code(Path())
    return build_model(name).eval()


def _runtime(options: argparse.Namespace) -> Runtime:
    """Make the runtime that the options name."""
    check_threads(options.threads, "--threads")
    return make_runtime(
        options.runtime,
        device=options.device,
        dtype=options.dtype,
        memory_format=options.memory_format,
        threads=options.threads,
        graph=options.graph,
        tf32=not options.no_tf32,
    )


def _part(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise ValueError(f"--part: expected 0/4 to 3/4 or the like, found {text!r}")
    return int(first), int(of)


def _facts(out: Path, content: dict[str, Any], entries: int) -> dict[str, Any]:
    """Return what ``--json`` prints: file, number of measured entries, cost of the network."""
    facts = {key: content.get(key) for key in ("metric", "unit", "original", "quality")}
    return {"file": str(out), "entries": entries, "spread": _spread(content), **facts}


def _spread(content: dict[str, Any]) -> float | None:
    """Return the median relative spread; None for one worker's part and after a single round."""
    spread: float | None = content.get("quality", {}).get("spread")
    return spread


def _summary(content: dict[str, Any]) -> str:
    if "costs" not in content:
        return "this worker's share is measured; `haloc measure --merge` makes the table"
    cost = median(content["network"]) if content.get("network") else content["original"]
    original = f"the network takes {cost:.4g} {MEASURED[content['metric']]}"
    spread, error = _spread(content), content["quality"].get("standard_error")
    if spread is None or error is None:
        return f"{original}; measured in one round, so that its error is unknown"
    return (
        f"{original}; median spread of an entry {100 * spread:.1f} %, standard error of a whole "
        f"network {100 * error:.1f} %"
    )


def main() -> None:
    """Run the command on a device; print a mendable error as one line and exit with status 2."""
    try:
        measure_main()
    except (ValueError, OSError) as error:
        print(f"haloc measure: {printable(reason_of(error))}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(
            f"haloc measure: needs the package {error.name}, which is not installed",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()

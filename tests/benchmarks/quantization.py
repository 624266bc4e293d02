"""Compare ways to quantize an ONNX file.

    python tests/benchmarks/quantization.py FOLDER [--batch 1 --batch 128] [--threads 1]

FOLDER is a finished run's. Each way gets its top-1 on validation images, the file's size, and the
time of a pass in ONNX Runtime, all ways timed in alternation (the median of five medians, and the
least of them). Test images are not looked at.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from onnxruntime.quantization import CalibrationMethod, QuantType

from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, quantize_onnx
from nni_haloc.costs.device.measure import time_together
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.runs.finished import Finished

U8, S8 = QuantType.QUInt8, QuantType.QInt8
WAYS = {
    "u8s8, 7-bit weights": {},
    "u8s8": {"reduce_range": False},
    "u8u8": {"reduce_range": False, "weight_type": U8},
    "s8s8": {"reduce_range": False, "activation_type": S8},
    "s8s8, 7-bit weights": {"activation_type": S8},
    "u8s8, 7-bit weights, entropy": {"calibrate_method": CalibrationMethod.Entropy},
    "u8s8, 7-bit weights, percentile": {"calibrate_method": CalibrationMethod.Percentile},
    "u8s8, 7-bit weights, Conv and Gemm alone": {"op_types_to_quantize": ["Conv", "Gemm"]},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    run, runtime = Finished(options.folder), OnnxRuntime(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for stage, network in run.networks().items():
            files = {"float32": Path(folder) / f"{stage}.onnx"}
            export_onnx(network, run.example(2), files["float32"])
            for number, (way, changes) in enumerate(WAYS.items()):
                files[way] = Path(folder) / f"{stage}-{number}.onnx"
                quantize_onnx(files["float32"], run.calibration_images(), files[way], **changes)
            facts = {
                way: {
                    "top1": run.job.accuracy(
                        OnnxNetwork(file, options.threads), run.job.loader("val")
                    )["top1"],
                    "bytes": file.stat().st_size,
                }
                for way, file in files.items()
            }
            for size in options.batch or [1, 128]:
                runs = {way: runtime.ready(str(file), size) for way, file in files.items()}
                found = [time_together(runs, runtime, 0.3) for _ in range(5)]
                for way, fact in facts.items():
                    times = [1e3 * each[way] for each in found]
                    fact |= {f"latency_ms_{size}": median(times), f"least_ms_{size}": min(times)}
            for way, fact in facts.items():
                print(json.dumps({"stage": stage, "way": way, **fact}), flush=True)

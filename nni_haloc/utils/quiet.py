"""Silence advice of NNI's, Lightning's and torch's that says nothing of a search or a training.

Everything that is silenced is listed here. Progress bars, our own log and every other warning stay.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

WARNINGS = (
    ".*does not have many workers.*",  # data are in memory, or the settings name the workers
    ".*number of training batches.*smaller than the logging interval.*",
    ".*`isinstance.treespec.*",  # Lightning's own use of torch
    ".*LeafSpec.*",
    ".*no `val_dataloader`.*",  # a fine-tuning without validation images
    ".*wrap PyTorch DataLoader with nni.trace.*",  # a search stays in this process
    ".*is found to be not a nn.Module.*",  # classes of torch.nn that are newer than NNI
)
"""Messages of warnings, as regular expressions."""

CONFIGURED_TWICE = "nni.nas.experiment.config.experiment", "`training_service` will be ignored"
"""NNI says this of its own default, each time that it reads an experiment's configuration."""

LOGS = (
    ("pytorch_lightning.utilities.rank_zero", "", logging.INFO),  # devices, tips, "fit stopped"
    ("pytorch_lightning.accelerators.cuda", "", logging.INFO),
    ("pytorch_lightning.loggers.mlflow", "Experiment with name", logging.WARNING),  # a new one
    ("nni.experiment.experiment", "", logging.INFO),
    ("nni.nas.experiment.experiment", "", logging.INFO),
    ("nni.nas.experiment.config.experiment", "", logging.INFO),
    (*CONFIGURED_TWICE, logging.WARNING),
    ("nni.nas.oneshot.pytorch.strategy", "Checkpoint callback is found", logging.WARNING),
    ("nni.nas.evaluator.pytorch.lightning", "Validation dataloaders are missing", logging.WARNING),
    # Said of an exception that is raised anyway:
    ("nni.nas.evaluator.pytorch.lightning", "Trainer status is detected", logging.WARNING),
    ("nni.nas.strategy.base", "Strategy failed to execute", logging.ERROR),
    # Identity has no channels, and is rightly left as it is:
    (
        "nni.compression.speedup.model_speedup",
        "Has not supported replacing module with type: Identity",
        logging.ERROR,
    ),
)
"""Logger, how its message begins (a regular expression), and up to which level it is dropped."""


class Dropped(logging.Filter):
    """Drop a logger's records up to a level that begin with a message.

    Args:
        message: regular expression of a record's beginning; the empty one is all records.
        level: records above it stay.
    """

    def __init__(self, message: str, level: int) -> None:
        super().__init__()
        self.message, self.level = re.compile(message), level

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record stays."""
        return record.levelno > self.level or not self.message.match(record.getMessage())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what is listed here while the block runs; afterwards all is as it was."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        for name, message, level in LOGS:
            logger, dropped = logging.getLogger(name), Dropped(message, level)
            logger.addFilter(dropped)
            stack.callback(logger.removeFilter, dropped)
        yield


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Let a logger, and those below it, say nothing but errors while the block runs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Let a logger, and those below it, say nothing while the block runs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_prints() -> Iterator[None]:
    """Drop what compiled code prints to the standard output while the block runs.

    HiGHS prints a line of its own debugging now and then, whatever its options say. Blocks of
    several threads may overlap: the last one that ends gives the output back.
    """
    with _LOCK:
        if not _KEPT:
            _KEPT.append(_leave_output())
        _KEPT.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _KEPT.pop()
            if len(_KEPT) == 1:
                _take_back(_KEPT.pop())


_LOCK = threading.Lock()
_KEPT: list[int | None] = []
"""A copy of the standard output's descriptor, and None for each block that runs."""


def _leave_output() -> int | None:
    """Point the standard output to nowhere; return a copy of it, None if there is none."""
    try:
        sys.stdout.flush()
        _flush()
        kept = os.dup(1)
    except (AttributeError, OSError, ValueError):
        return None
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return kept


def _take_back(kept: int | None) -> None:
    if kept is not None:
        _flush()  # what C has buffered belongs to the block
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what C's own output has buffered."""
    ctypes.CDLL(None).fflush(None)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide what exporters and quantizers write for their developers, for a block's time."""
    noisy = [
        logging.getLogger(name)
        for name in (
            "",
            "torch.onnx",
            "torch.export",
            "torch.fx",
            "torch.utils",
            "torch._dynamo",
            "onnxscript",
            "onnx_ir",
        )
    ]
    levels = [each.level for each in noisy]
    said = StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        for each in noisy:
            each.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for each, level in zip(noisy, levels, strict=True):
                each.setLevel(level)

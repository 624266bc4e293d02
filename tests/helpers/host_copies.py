"""Count the operations that make a processor wait for its device."""

import traceback
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING_FUNCTIONS = {
    "__bool__",
    "__complex__",
    "__contains__",
    "__float__",
    "__format__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "numpy",
    "tolist",
}
"""Methods of tensors that need their values on the processor."""
WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique_dim",
    "_unique2",
}
"""Operations that do so inside of torch; an index of booleans does, too."""


@contextmanager
def waits():
    """Yield a list of the places where the processor would wait for a CUDA device.

    On a processor there is nothing to wait for, so it is the operations that are looked at. Left
    out are values that are on the processor on any device: what `nni_haloc.utils.placement` has
    brought there, and the step counts of torch's optimizers.
    """
    found = []

    def note(name):
        frames = [frame.filename for frame in traceback.extract_stack()[:-2]]
        brought = name == "numpy" and frames[-1].endswith("utils/placement.py")
        if not brought and not any("torch/optim/" in frame for frame in frames):
            found.append(f"{name}: {_place()}")

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in WAITING_FUNCTIONS and "Tensor" in repr(func):
                note(name)
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in WAITING_OPERATIONS or (name.startswith("index") and _has_booleans(args)):
                note(name)
            return func(*args, **(kwargs or {}))

    with Functions(), Operations():
        yield found


def _has_booleans(args):
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:]))


def _place():
    frames = [f for f in traceback.extract_stack() if "nni_haloc" in f.filename]
    return " < ".join(f"{f.filename.rpartition('nni_haloc/')[2]}:{f.lineno}" for f in frames[-2:])


@contextmanager
def no_waits_on(device):
    """Fail where a block waits for a device: by torch's own watch on CUDA, else by `waits`."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with waits() as found:
            yield
        assert not found, found

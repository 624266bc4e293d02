"""The search on NNI: the only folder that imports `nni.nas`."""

import warnings

with warnings.catch_warnings():
    # NNI wraps every class of torch.nn and warns of those that are newer than itself.
    warnings.filterwarnings("ignore", ".*is found to be not a nn.Module.*", RuntimeWarning)
    # First of all of NNI's modules: if its one-shot strategies are imported before this one, NNI
    # leaves stubs in their place for good.
    import nni.nas.strategy  # noqa: F401

"""The search on NNI: the only folder that imports `nni.nas`."""

from nni_haloc.utils.quiet import quiet

with quiet():
    # First of all of NNI's modules: if its one-shot strategies are imported before this one, NNI
    # leaves stubs in their place for good.
    import nni.nas.strategy  # noqa: F401

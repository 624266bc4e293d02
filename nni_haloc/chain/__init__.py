"""NNI's pruners and quantizers, and export to other formats."""

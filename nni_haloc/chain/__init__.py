"""NNI's pruners and quantizers, and export to other formats; each file imports what it needs."""

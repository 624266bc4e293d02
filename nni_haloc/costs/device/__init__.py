"""Measuring on a device: what it takes besides the standard library is imported where it is used, PyTorch or ONNX Runtime alone.

`Specification` says what to time, `measure` times it and keeps ``costs.json``; the runtimes are in files of their own.
"""

"""Measuring on a device that has PyTorch or ONNX Runtime, but neither NNI nor Lightning.

`Specification` says what to time, `measure` times it and keeps ``costs.json``. Each runtime is in a
file of its own, and what it needs is imported when it is used.
"""

"""Quantization: calibrate, AWQ, KV ranges, export, evaluate. Its first parts come with the next version."""

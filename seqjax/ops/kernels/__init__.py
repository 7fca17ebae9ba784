"""Pallas kernels: `*_tpu.py` for Mosaic TPU, `*_gpu.py` for Mosaic GPU."""

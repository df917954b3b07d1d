"""The benchmark of kernels and of the training step on one CUDA device: `python -m scripts.bench`, or `make bench`."""

"""The CUDA C++ kernels of `csrc/cuda`."""

"""The Triton kernels of `fastpeft_kernels`."""

"""fastpeft's kernels: the compiled modules, and Triton. Import them through `fastpeft`, which checks the build."""

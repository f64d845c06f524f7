"""The passes of every op, a folder a device; `base.py` for what stands under them, `plans.py` for which way is fastest."""

from . import decode  # noqa: F401  it gives 4-bit weights their way to dense ones

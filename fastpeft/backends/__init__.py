"""The passes of every op, a folder a device; `base.py` for what stands under them, `plans.py` for which way is fastest."""

from . import base  # noqa: F401  it gives 4-bit weights their decoder

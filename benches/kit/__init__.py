"""Measures any op of `benches/<stem>.py`: checks it, times it beside its peers, judges, tabulates, plots, gates."""

import logging

# bitsandbytes warns that a package `kernels` would give it another CPU kernel. In a clone it finds our folder of that name,
# so that the advice is wrong too. This has to stand before peft or transformers import bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "pip install kernels" not in str(record.msg)
)

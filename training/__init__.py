"""The command line, the demo, and the room for training and evaluation: the one that may import diffusers."""

import logging

# diffusers imports bitsandbytes, which then warns on some processors that kernels are missing: those of 4-bit models,
# which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

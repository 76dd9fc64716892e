"""The base: loading it as NF4, wrapping its layers, attention over paged KV."""

import logging

# At import it warns that a package is missing which, if present, would make it download code from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

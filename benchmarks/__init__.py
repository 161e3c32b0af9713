"""What DS-Sync costs beside its peers, on a cluster emulated on one machine (not part of the wheel)."""

import os

# Before torch loads: emulated hosts have no names, about which every connection would warn.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

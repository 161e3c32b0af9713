"""Settings of the whole suite."""

import torch
from hypothesis import settings

# One thread per process, so that a fork never inherits an OpenMP pool whose threads it does not have.
torch.set_num_threads(1)

# These machines are shared: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

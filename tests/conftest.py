"""Settings of the whole suite."""

import os

import torch
from hypothesis import settings

# torch's store asks for the name of every address: a name server that drops the question costs it 1 s instead of 5.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# One thread per process, so that a fork never inherits an OpenMP pool whose threads it does not have.
torch.set_num_threads(1)

# These machines are shared: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

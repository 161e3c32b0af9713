"""One thread per process, so that a fork never inherits an OpenMP pool whose threads it does not have."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

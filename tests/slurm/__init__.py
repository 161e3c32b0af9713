"""Training under a real Slurm of several nodes on this machine."""

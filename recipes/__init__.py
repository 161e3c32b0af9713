"""What a user trains: Hydra recipes and the demo (not part of the wheel)."""

import os
import signal

if "SLURM_JOB_ID" in os.environ:
    # The requeue signal would end the job while everything is imported; from here on it waits until fit can answer it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

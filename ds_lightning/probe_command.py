"""``python -m ds_lightning probe``: measures the network among the hosts of a job, and writes it down as YAML.

Run it on the hosts of the job, one process each or more, by torchrun, srun or `benchmarks.cluster`. It needs no GPU and
no Trainer, only the key-value store of torch.distributed.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from ds_lightning.command import Parser

# All have asked the store before; whoever does not hear rank 0 now has ended.
_HEARING = timedelta(seconds=5)
USAGE = "torchrun --nnodes N --nproc-per-node 1 ... -m ds_lightning probe [--output cluster.yaml]"


class _Job(NamedTuple):
    """Who this process is, and where all meet."""

    rank: int
    ranks: int
    address: str
    port: int


def main(argv: list[str]) -> int:
    """Parses the command line, probes, and on rank 0 prints and writes what was found."""
    parser = Parser("probe", f"Measures the network among the hosts of a job, and writes it down. Usage: {USAGE}")
    parser.add_argument("--output", type=Path, help="the YAML file to write; without it, nothing is written")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for all of it (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.timeout <= 86400:
        parser.error(f"--timeout is {args.timeout:g}, but must be above 0 and at most 86400 seconds")
    try:
        job = _job()
    except ValueError as error:
        parser.error(str(error))
    refusal = _refuse(args.output, args.force) if job.rank == 0 and args.output is not None else ""
    try:
        _probe(job, timedelta(seconds=args.timeout), args.output, refusal)
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, OSError) as error:
        print(f"python -m ds_lightning probe: rank {job.rank}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _refuse(output: Path, force: bool) -> str:
    """Why the file cannot be written, if so."""
    if output.is_dir():
        return f"{output} is a folder. HINT: name a file."
    if output.exists() and not force:
        return f"{output} exists. HINT: name another file, or add --force."
    if not output.absolute().parent.is_dir():
        return f"{output} cannot be written: there is no folder {output.parent}. HINT: make it."
    return ""


def _job() -> _Job:
    """From the variables of torchrun or of Slurm.

    Raises:
        ValueError: If there are none, or a number is none.
    """
    names = {"rank": "RANK", "ranks": "WORLD_SIZE", "port": "MASTER_PORT"}
    values = {what: os.environ.get(name) for what, name in names.items()}
    address = os.environ.get("MASTER_ADDR")
    if values["rank"] is None and "SLURM_PROCID" in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        names |= {"rank": "SLURM_PROCID", "ranks": "SLURM_NTASKS"}
        values |= {what: os.environ.get(names[what]) for what in ("rank", "ranks")}
        job_id = os.environ.get("SLURM_JOB_ID", "")[-4:]
        values["port"] = values["port"] or (str(15000 + int(job_id)) if job_id.isdecimal() else None)
        nodes = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST")
        address = address or (nodes and SLURMEnvironment.resolve_root_node_address(nodes))
    if address is None or None in values.values():
        lacks = [names[what] for what, value in values.items() if value is None] + ["MASTER_ADDR"] * (address is None)
        raise ValueError(
            f"no job: {', '.join(lacks)} not set. HINT: run {USAGE}, or srun python -m ds_lightning probe."
        )
    numbers = {}
    for what, value in values.items():
        if not str(value).isdecimal():
            raise ValueError(f"{names[what]} is {value!r}, not a number. HINT: let torchrun or srun set it.")
        numbers[what] = int(str(value))
    if not numbers["rank"] < numbers["ranks"]:
        raise ValueError(f"rank {numbers['rank']} is not below the number of ranks, {numbers['ranks']}.")
    if not 0 < numbers["port"] < 65536:
        raise ValueError(f"{names['port']} is {numbers['port']}, but ports are 1 to 65535. HINT: let torchrun set it.")
    os.environ["MASTER_ADDR"] = address  # by which a station finds its own address
    return _Job(numbers["rank"], numbers["ranks"], address, numbers["port"])


def _probe(job: _Job, timeout: timedelta, output: Path | None, refusal: str) -> None:
    """Raises a ``ValueError`` on all ranks if rank 0 has a refusal."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    from ds_lightning.groups import within
    from ds_lightning.probe import probe

    start = time.monotonic()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself keeps the store on this port
    server = job.rank == 0 and not agent
    try:
        store = within(timeout, lambda: TCPStore(job.address, job.port, None, server, timeout, wait_for_workers=False))
        own = PrefixStore(f"dssync: probe {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        own.set(f"host {job.rank}", socket.gethostname())
        own.set(f"refusal {job.rank}", refusal)
        keys = [f"{what} {rank}" for what in ("host", "refusal") for rank in range(job.ranks)]
        words = within(timeout, lambda: [own.get(key).decode() for key in _there(own, keys, timeout)])
    except RuntimeError as error:
        raise RuntimeError(
            f"the {job.ranks} ranks did not meet at {job.address}:{job.port} within {timeout}: {error}"
        ) from None
    hosts, refusals = words[: job.ranks], words[job.ranks :]
    if any(refusals):
        own.set(f"heard {job.rank}", "")
        if server:  # the store ends with this process
            heard = [f"heard {rank}" for rank in range(job.ranks)]
            with suppress(RuntimeError):
                within(_HEARING, lambda: _there(own, heard, _HEARING))
        raise ValueError(next(filter(None, refusals)))
    left = timeout - timedelta(seconds=time.monotonic() - start)
    found = probe(own, job.rank, hosts, timeout=left)
    if job.rank == 0:
        print(found.topology)
        print(f"{found.rounds} rounds in {found.seconds:.1f} s; no host sent more than {found.sent / 2**20:.0f} MiB.")
        if output is not None:
            output.write_text(found.topology.to_yaml(), encoding="utf-8")
            print(f"Wrote {output}.")


def _there(store: object, keys: list[str], timeout: timedelta) -> list[str]:
    store.wait(keys, timeout)  # type: ignore[attr-defined]
    return keys

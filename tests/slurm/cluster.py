"""A real Slurm of four nodes on this machine, with a controller, daemons, ports and a munge key of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2", "n3", "n4")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=1,bf_interval=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=30 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=30 State=UP PriorityTier=2 PreemptMode=OFF
"""
# There is no accounting: submitit learns from this that a job has ended.
SACCT = """\
#!/bin/sh
echo "JobID|State|NodeList"
scontrol --oneliner show jobs | sed -nE 's/^JobId=([0-9]+) .*JobState=([A-Z_]+) .*/\\1|\\2|/p; \
s/^JobId=[0-9]+ ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) .*JobState=([A-Z_]+) .*/\\1_\\2|\\3|/p'
"""


def why_not() -> str | None:
    """Why there can be no Slurm here, which is installed where that is possible; None if there can."""
    if os.geteuid() != 0:
        return f"a Slurm of several nodes on one machine needs root, but the user id is {os.geteuid()}"
    if all(map(shutil.which, PROGRAMS)):
        return None
    if shutil.which("apt-get") is None:
        return f"Slurm is not installed ({', '.join(PROGRAMS)}), and there is no apt-get to install it with"
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode:
            return f"Slurm could not be installed: {done.stderr.strip()[-300:]}"
    return None


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        folder: Its files, logs among them.
        environment: In which Slurm's commands talk to it.
    """

    folder: Path
    environment: dict[str, str]

    def command(self, *command: str, timeout: float = 60, cwd: Path | None = None, **more: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**self.environment, **more}
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}{self.logs()}")
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, **more: str) -> str:
        """The id of a new job."""
        return self.command("sbatch", "--parsable", *arguments, cwd=cwd, **more)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job."""
        shown = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, timeout: float, *states: str) -> dict[str, str]:
        """Until a job is in one of ``states``; by default, until it has ended."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.job(job)["JobState"] in ended, timeout, f"job {job} to be {' or '.join(ended)}")
        return self.job(job)

    def until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: With what the cluster's daemons have logged.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s in vain for {what}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        ends = {path.name: path.read_text().splitlines()[-8:] for path in sorted(self.folder.glob("*.log"))}
        return "".join(f"--- {name}\n" + "\n".join(lines) + "\n" for name, lines in ends.items())


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster of :data:`NODES`, each a daemon that believes to be on a host of that name."""
    host = socket.gethostname()
    ports = _free_ports(1 + len(NODES))
    described = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    (folder / "state").mkdir(parents=True)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder, nodes=described))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    sacct = folder / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(SACCT)
    sacct.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"SLURM_CONF": str(configuration), "PATH": f"{sacct.parent}:{os.environ['PATH']}"}
    cluster = Slurm(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str, log: str) -> None:
        with (folder / log).open("wb") as file:
            daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
                )
            )

    try:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        start("munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *options, log="munged.out")
        cluster.until((folder / "munge.socket").exists, 10, "munged")
        start("slurmctld", "-D", "-i", log="slurmctld.out")
        for name in NODES:
            hosts = folder / f"hosts-{name}"
            hosts.write_text(f"127.0.0.1 localhost {host}\n" + "".join(f"127.0.0.1 {n}\n" for n in NODES))
            script = f'hostname {name} && mount --bind "{hosts}" /etc/hosts && exec slurmd -D -N {name}'
            start("unshare", "--uts", "--mount", "sh", "-c", script, log=f"slurmd-{name}.out")
        cluster.until(lambda: _idle(cluster) == len(NODES), 30, "all nodes to be idle")
        yield cluster
    finally:
        _end(cluster, daemons)


def _idle(cluster: Slurm) -> int:
    try:
        shown = cluster.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t", timeout=10)
    except (RuntimeError, subprocess.TimeoutExpired):  # the controller is not there yet
        return 0
    return shown.split().count("idle")


def _end(cluster: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Jobs first: their processes have left the daemons' sessions."""
    try:
        cluster.command("scancel", "--full", "--signal=KILL", "--user=root", timeout=10)
        cluster.command("scancel", "--user=root", timeout=10)
        cluster.until(lambda: not cluster.command("squeue", "--noheader", timeout=10), 20, "jobs to end")
    except (RuntimeError, subprocess.TimeoutExpired, TimeoutError):
        pass
    for daemon in reversed(daemons):
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(daemon.pid, signum)
                daemon.wait(10)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()

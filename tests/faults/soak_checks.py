"""What the diaries of a soak's ranks must say. Pure Python: a planted defect must be found without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import NamedTuple

SAVE_EVERY = 20  # steps between checkpoints
STOPPED = 128 + 15  # exit code after an agreed stop
NAMES = (
    r"Rank \d+ could not average step \d+ with (ranks? [^:]+) within ",
    r"Rank \d+ waited in vain for (ranks? .+?) (?:to|for|at) .*at most ",
    r"Rank \d+ was to stop \(.+\), but (ranks \[.+\]) did not say",
    r"Rank \d+ lost the store of (rank 0), in which ",
)
# Per 1,000 steps. A leak of a float or a small object per step is 1,000 blocks, one of a copy of the model 90 MB.
BOUNDS = {"RSS MB": 1.0, "tensor MB": 0.01, "Python blocks": 500.0}


class Memory(NamedTuple):
    """One measurement of a rank."""

    step: int
    resident: int
    tensors: int
    blocks: int
    files: int


@dataclass
class Record:
    """What one rank wrote down in one attempt."""

    ready: bool = False
    begin: int | None = None
    losses: dict[int, str] = field(default_factory=dict)
    saving: list[tuple[int, str]] = field(default_factory=list)
    saved: list[tuple[int, str]] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    end: str = ""

    @property
    def reached(self) -> int | None:
        """The last step."""
        return max(self.losses, default=self.begin)

    @property
    def resumable(self) -> int:
        """The step of the newest checkpoint that is whole and that ``ckpt_path="last"`` looks for."""
        return max((step for step, name in self.saved if name.startswith(("last", "hpc"))), default=0)


def read(path: Path) -> Record:
    """A rank's diary; an empty record if it has not begun one."""
    record = Record()
    for line in path.read_text().splitlines() if path.exists() else []:
        word, _, rest = line.partition(" ")
        if word == "ready":
            record.ready = True
        elif word == "begin":
            record.begin = int(rest)
        elif word == "step":
            step, loss = rest.split()
            record.losses[int(step)] = loss
        elif word in ("saving", "saved"):
            step, name = rest.split(" ", 1)
            (record.saving if word == "saving" else record.saved).append((int(step), name))
        elif word == "memory":
            record.memory.append(Memory(*map(int, rest.split())))
        else:
            record.end = line
    return record


@dataclass
class Attempt:
    """One start of the job and how it ended.

    Attributes:
        number: From 0 on.
        fault: The kind of the fault that ended it.
        victim: The rank that it hit.
        gone: Ranks that the fault itself ended or stopped, of which no word is expected.
        stops: Whether all ranks must end by an agreed stop.
        may_stop: Whether they may.
        late: Ranks that had not ended in time.
        codes: Exit codes of the others.
        records: Of all ranks.
    """

    number: int
    fault: str
    victim: int
    gone: set[int]
    stops: bool
    may_stop: bool
    late: list[int]
    codes: dict[int, int | None]
    records: list[Record]


def check_end(attempt: Attempt) -> list[str]:
    """Whether all survivors ended in time, told so by their exit code, and said whom they missed."""
    where = f"attempt {attempt.number} ({attempt.fault} of rank {attempt.victim})"
    problems = [f"{where}: rank {rank} had not ended in time" for rank in attempt.late]
    blamed: set[int] = set()
    known = False  # whether somebody was far enough to know whom it missed
    for rank, record in enumerate(attempt.records):
        if rank in attempt.gone or rank in attempt.late:
            continue
        code = attempt.codes[rank]
        if record.end == "stopped" and code == STOPPED and (attempt.stops or attempt.may_stop):
            continue
        message = record.end.removeprefix("failed ")
        if attempt.stops or code != 1 or message == record.end:
            problems.append(f"{where}: rank {rank} ended with code {code} and {record.end!r}")
        elif record.ready:
            named = [found[1] for name in NAMES if (found := re.search(name, message))]
            if not named:
                problems.append(f"{where}: rank {rank} names nobody: {message}")
            blamed |= {int(n) for n in re.findall(r"\b\d+(?= \(|,|\]|$)", " ".join(named))}
            known = True
    if known and not attempt.may_stop and attempt.victim not in blamed:
        problems.append(f"{where}: only {sorted(blamed)} were blamed")
    return problems


def check_resumes(attempts: Iterable[Attempt]) -> tuple[list[str], list[int]]:
    """Whether each attempt began at the last checkpoint; and how many steps each one trained again."""
    problems, lost = [], []
    saved = reached = 0
    for attempt in attempts:
        begins = {record.begin for record in attempt.records} - {None}
        if len(begins) > 1:
            problems.append(f"attempt {attempt.number}: ranks began at steps {sorted(map(str, begins))}")
        for begin in begins:
            assert begin is not None
            if not saved <= begin <= reached:
                problems.append(
                    f"attempt {attempt.number} began at step {begin}, with {saved} saved and {reached} reached before"
                )
            if reached - begin > SAVE_EVERY:
                problems.append(f"attempt {attempt.number} began {reached - begin} steps before the last")
            lost.append(reached - begin)
            reached = max(record.reached or 0 for record in attempt.records)
        saved = max(saved, *(record.resumable for record in attempt.records))
    return problems, lost


def check_losses(attempts: Iterable[Attempt], reference: Sequence[Record], final: int) -> list[str]:
    """Whether every step that a rank took, also those taken again, had the undisturbed run's loss, bit for bit."""
    problems = []
    taken: list[set[int]] = [set() for _ in reference]
    for attempt in attempts:
        for rank, record in enumerate(attempt.records):
            taken[rank] |= record.losses.keys()
            other = [step for step, loss in record.losses.items() if reference[rank].losses.get(step) != loss]
            if other:
                problems.append(f"attempt {attempt.number}: rank {rank} left the undisturbed run at step {min(other)}")
    for rank, steps in enumerate(taken):
        if missing := set(range(1, final + 1)) - steps:
            problems.append(f"rank {rank} never took {len(missing)} steps, the first of them {min(missing)}")
    return problems


def check_final(disturbed: Sequence[Record], reference: Sequence[Record]) -> list[str]:
    """Whether all ranks of both runs ended with one model."""
    ends = [record.end for record in (*disturbed, *reference)]
    if len(set(ends)) == 1 and ends[0].startswith("done "):
        return []
    return [f"the final models differ: disturbed {ends[: len(disturbed)]}, undisturbed {ends[len(disturbed) :]}"]


def growth(record: Record) -> dict[str, float]:
    """Of a rank's memory per 1,000 steps, in the second half of its measurements."""
    samples = record.memory[len(record.memory) // 2 :]

    def per_1000(values: Iterable[float]) -> float:
        return 1000 * linear_regression([s.step for s in samples], list(values)).slope

    return {
        "RSS MB": per_1000(s.resident / 1e6 for s in samples),
        "tensor MB": per_1000(s.tensors / 1e6 for s in samples),
        "Python blocks": per_1000(s.blocks for s in samples),
    }


def check_memory(records: Sequence[Record]) -> list[str]:
    """Whether memory and open files of an undisturbed run stayed what they were."""
    problems = []
    for rank, record in enumerate(records):
        if len(record.memory) < 10:
            problems.append(f"rank {rank} was measured {len(record.memory)} times only")
            continue
        for what, value in growth(record).items():
            if value > BOUNDS[what]:
                problems.append(f"rank {rank} gains {value:.3f} {what} per 1,000 steps, more than {BOUNDS[what]:g}")
        files = [sample.files for sample in record.memory]
        if files[-1] > files[0]:
            problems.append(f"rank {rank} had {files[0]} open files and then {files[-1]}")
    return problems


def check_files(run: Path, temporary: Path, stops: int, final: int) -> list[str]:
    """Whether the run's folder holds its checkpoints, the last stop's replicas, and nothing else."""
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    newest = max((int(name[9:-5]) for name in found if re.fullmatch(r"hpc_ckpt_\d+\.ckpt", name)), default=0)
    expected = {f"hpc_ckpt_{n}.ckpt" for n in range(1, newest + 1)} | {"checkpoints/last.ckpt"}
    kept = [name for name in found if re.fullmatch(rf"checkpoints/epoch=\d+-step={final}\.ckpt", name)]
    replicas = [name for name in found if re.fullmatch(rf"replicas_{newest}/rank_\d+\.ckpt", name)]
    problems = []
    if other := found - expected - set(kept) - set(replicas):
        problems.append(f"files are left over: {sorted(other)}")
    if missing := expected - found:
        problems.append(f"files are missing: {sorted(missing)}")
    if len(kept) != 1 or newest != stops:
        problems.append(f"there are {kept} and {newest} checkpoints of {stops} stops")
    if more := sorted(str(path) for path in temporary.rglob("*")):
        problems.append(f"temporary files are left over: {more}")
    return problems

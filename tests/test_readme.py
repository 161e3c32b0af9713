"""What the README says is there, is there."""

import inspect
import re
from pathlib import Path

import pytest

from ds_lightning import DSSyncStrategy
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_options_table_is_complete_and_true():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE))
    parameters = inspect.signature(DSSyncStrategy).parameters.values()
    assert rows == {p.name: repr(p.default).replace("'", '"') for p in parameters if p.default is not p.empty}


def test_the_paths_of_the_reading_order_exist():
    tree = README.split("## Reading order")[1].split("```")[1]
    folder, paths = "", []
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        paths.append(folder + name)
        folder = name if name.endswith("/") else folder
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"`make (\w+)`", README)) | set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test", "install", "parity"}
    assert not [target for target in targets if f"\n{target}:" not in makefile]


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path, monkeypatch):
    code = README.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)

    def run(rank):
        exec(compile(code, "README", "exec"), {"__name__": "__main__"})

    run_ranks(run, 4, init=False, timeout=100)

"""``python -m ds_lightning plan``: what it prints and writes, and one line for everything that is wrong."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

from ds_lightning import __main__ as command_line
from ds_lightning import plan_command
from ds_lightning.command import parameters
from ds_lightning.cost import rounds
from ds_lightning.plan_command import figures, main
from ds_lightning.planner import plan
from ds_lightning.schedule import CyclicSchedule, mixing_matrix, schedule_parts, schedule_period
from ds_lightning.topology import Topology

RACKS = """
bandwidth: 10
switches:
  core:
  rack[0-1]: {to: core, bandwidth: 10}
hosts:
  n[0-3]: {to: rack0}
  n[4-7]: {to: rack1}
"""
PAIR = "bandwidth: 10\nhosts:\n  n[0-1]:\n"


@pytest.fixture
def run(tmp_path, capsys):
    """Plan for a YAML text, and return the exit code, what was printed, and the folder of the files."""

    def run(text, *options, output=tmp_path / "out"):
        (tmp_path / "cluster.yaml").write_text(text)
        code = code_of(["--topology", str(tmp_path / "cluster.yaml"), "--output", str(output), *options])
        printed = capsys.readouterr()
        folders = [*output.glob("plan/*")] if output.is_dir() else []
        return code, printed, max(folders, default=None)

    return run


def code_of(argv):
    """Argparse leaves by SystemExit."""
    try:
        return main(argv)
    except SystemExit as end:
        return end.code


def error_of(result):
    """The one line on stderr."""
    code, printed, folder = result
    assert code == 2
    assert folder is None
    assert printed.err.startswith("python -m ds_lightning plan: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("110M", 110_000_000),
        ("1.5B", 1_500_000_000),
        ("25k", 25_000),
        ("25K", 25_000),
        ("123456", 123_456),
        ("110_000_000", 110_000_000),
        ("1e6", 1_000_000),
        ("1.", 1),
        (".5k", 500),
        ("0.0000001B", 100),
        ("1.2T", 1_200_000_000_000),
    ],
)
def test_numbers_of_parameters(text, number):
    assert parameters(text) == number


@pytest.mark.parametrize("text", ["", "M", "110X", "1.5.2", "-5", "nan", "inf", "1 000 M", "ten", "1e999", "110MB"])
def test_what_is_no_number_of_parameters(run, text):
    assert "no number of parameters" in error_of(run(RACKS, f"--parameters={text}"))


@pytest.mark.parametrize("text", ["0", "0M", "0.0001", "1e20", "99999T"])
def test_numbers_of_parameters_out_of_range(run, text):
    assert "is not between 1 and" in error_of(run(RACKS, f"--parameters={text}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: --parameters"),
        (["--parameters", "1M", "--compute", "-1"], "not between 0 and"),
        (["--parameters", "1M", "--compute", "nan"], "not between 0 and"),
        (["--parameters", "1M", "--compute", "1e9"], "not between 0 and"),
        (["--parameters", "1M", "--compute", "0.35s"], "no number of seconds"),
        (["--parameters", "1M", "--wire", "fp8"], "choose from"),
        (["--parameters", "1M", "--seed", "x"], "--seed"),
        (["--parameters", "1M", "--speed", "9"], "--speed"),
    ],
)
def test_wrong_options(run, options, message):
    assert message in error_of(run(RACKS, *options))


def test_files_that_are_wrong(run, tmp_path, capsys):
    options = ("--parameters", "1M")
    assert "cluster.yaml:2: this is not YAML" in error_of(run("hosts: [", *options))
    assert "cluster.yaml:2: missing bandwidth: the link of n0" in error_of(run("hosts:\n  n[0-3]:\n", *options))
    alone = "bandwidth: 1\nhosts:\n  n0: {ranks: [0, 1]}\n"
    assert "one host alone has no network to plan for" in error_of(run(alone, *options))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, message in [("none.yaml", "no topology"), (".", "directory"), ("bytes", "UTF-8")]:
        code = code_of(["--topology", str(tmp_path / path), *options])
        assert message in error_of((code, capsys.readouterr(), None))


def test_hosts_that_do_not_resolve(run):
    hosts = "bandwidth: 1\nhosts:\n  localhost:\n  no-such-host.invalid:\n"
    error = error_of(run(hosts, "--parameters", "1M", "--resolve"))
    assert "cluster.yaml:4: " in error
    assert "no-such-host.invalid" in error


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is a file" in error_of(run(RACKS, "--parameters", "1M", output=output))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan").write_text("")
    assert "is a file" in error_of((*run(RACKS, "--parameters", "1M")[:2], None))


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_without_the_extra(run, missing, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(missing) or name == "ds_lightning.plan_picture"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"{missing} cannot be imported .* pip install 'ds_lightning"):
        run(RACKS, "--parameters", "1M")


def test_the_file_holds_the_plan(run):
    code, printed, folder = run(RACKS, "--parameters", "110M", "--compute", "0.35", "--seed", "3")
    assert code == 0
    content = json.loads((folder / "plan.json").read_text())
    found = plan(Topology.parse(RACKS), 440e6, 0.35, seed=3)
    loaded = CyclicSchedule(content["partitions"], content["parts"])
    assert loaded.parts == schedule_parts(found.schedule)
    assert loaded.period == schedule_period(found.schedule)
    for t in range(loaded.period):
        assert (mixing_matrix(loaded, t) == mixing_matrix(found.schedule, t)).all()
    assert Topology.parse(content["topology"]) == found.topology
    given = {"parameters": 110_000_000, "wire": "fp32", "size": 440e6, "compute": 0.35, "overlap": True, "seed": 3}
    assert given.items() <= content.items()
    assert content["verdict"] == found.verdict
    rows = content["options"]
    assert [row["name"] for row in rows] == [found.best.name, *(option.name for option in found.alternatives)]
    assert [row["is_plan"] for row in rows] == [True, *[False] * len(found.alternatives)]
    assert rows[0]["seconds"] == found.best.seconds
    assert rows[0]["times_faster"] == found.alternatives[0].seconds / found.best.seconds
    assert next(row for row in rows if row["name"] == "blind pairs")["error_to_pairs"] == 1
    # As the cost model has it: each rack's link carries what crosses it.
    assert rows[0]["busiest_link"] in ("rack0", "rack1")
    assert png_size(folder / "plan.png") == (1540, 990)
    assert str(folder / "plan.png") in printed.out


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_plan_in_parts(run):
    """The file loads as that schedule, and what is printed of links is the mean of what the parts put on them."""
    hosts = "  n[0-6]: {to: rack0}\n  n7: {to: rack1, bandwidth: 2.5}\n"
    text = f"bandwidth: 10\nswitches:\n  core:\n  rack[0-1]: {{to: core}}\nhosts:\n{hosts}"
    code, printed, folder = run(text, "--parameters", "25M", "--compute", "0")
    assert code == 0, printed.err
    content = json.loads((folder / "plan.json").read_text())
    loaded, found = CyclicSchedule(content["partitions"], content["parts"]), plan(Topology.parse(text), 100e6, 0.0)
    assert repr(loaded) == repr(found.schedule)
    assert loaded.parts == 4
    assert "> planned in 4 parts" in printed.out
    assert "of part 0 of 4; part q of the model has those of q steps later" in printed.out
    assert f"rack1{'   0.25' * loaded.period}\n" in printed.out.replace("rack1 ", "rack1")
    assert png_size(folder / "plan.png") == (1540, 990)


def test_what_is_printed(run):
    code, printed, folder = run(RACKS, "--parameters", "110M", "--compute", "0.35")
    assert code == 0
    assert str(Topology.parse(RACKS)) in printed.out
    content = json.loads((folder / "plan.json").read_text())
    assert content["verdict"] in printed.out
    assert "> planned" in printed.out
    for row in content["options"]:
        assert row["name"] in printed.out
    steps = [line.split(":", 1)[1] for line in printed.out.splitlines() if line.startswith("  step ")]
    assert len(steps) == len(content["partitions"])
    for line, partition in zip(steps, content["partitions"], strict=True):
        together, alone = line.split("}")[:-1], line.split("}")[-1]
        groups = [[int(rank) for rank in group.strip(" {").split(",")] for group in together]
        groups += [[int(word)] for word in alone.split() if word != "alone"]
        assert sorted(groups) == sorted(partition)
    found = plan(Topology.parse(RACKS), 440e6, 0.35)
    network, period = found.network, rounds(found.schedule)
    for i, rack in enumerate(("rack0", "rack1")):
        assert network.nodes[i] == rack
        models = [network.traffic(*period.step(t))[i] for t in range(len(period))]
        assert f"  {rack} " + "".join(f"{each:7.4g}" for each in models) in printed.out


@pytest.mark.parametrize(("wire", "size"), [("fp32", 4e6), ("bf16", 2e6), ("fp16", 2e6), ("int8", 1.0625e6)])
def test_wires(run, wire, size, monkeypatch):
    monkeypatch.setattr("ds_lightning.plan_picture.draw", lambda *_: None)
    code, printed, folder = run(PAIR, "--parameters", "1M", "--wire", wire, "--no-overlap")
    assert code == 0
    content = json.loads((folder / "plan.json").read_text())
    assert content["size"] == size
    assert content["overlap"] is False
    assert "not overlapped" in printed.out


def test_ddp_may_be_better(run):
    code, printed, folder = run("bandwidth: 400\nhosts:\n  n[0-7]:\n", "--parameters", "25M", "--compute", "1")
    assert code == 0
    assert "Plain DDP is the better choice here" in printed.out
    assert json.loads((folder / "plan.json").read_text())["ddp_is_better"] is True


@pytest.mark.parametrize(
    "hosts",
    [
        "n[0-1]:",  # all curves are one
        "n[0-2]:",
        "n[0-3]: {ranks: [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]}",
        "n[0-10]:",
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")  # as of labels that leave no room
def test_small_worlds(run, hosts):
    code, printed, folder = run(f"bandwidth: 10\nhosts:\n  {hosts}\n", "--parameters", "1M")
    assert code == 0, printed.err
    content = json.loads((folder / "plan.json").read_text())
    CyclicSchedule(content["partitions"], content["parts"])
    assert png_size(folder / "plan.png") == (1540, 990)


def test_many_ranks(run):
    racks = "".join(f"  r{rack}n[0-29]: {{to: rack{rack}}}\n" for rack in range(10))
    text = f"bandwidth: 25\nswitches:\n  core:\n  rack[0-9]: {{to: core, bandwidth: 100}}\nhosts:\n{racks}"
    code, printed, folder = run(text, "--parameters", "1M")
    assert code == 0
    assert "step 0:" not in printed.out
    assert "rack9 " in printed.out
    assert png_size(folder / "plan.png") == (1540, 990)


def test_the_plan_is_marked_where_it_is_an_alternative():
    found = plan(Topology.parse(RACKS), 4e6)
    pairs = next(option for option in found.alternatives if option.name == "blind pairs")
    rows = figures(replace(found, best=pairs))
    assert [row.name for row in rows if row.is_plan] == ["blind pairs"]
    assert len(rows) == len(found.alternatives)


def test_a_second_run_leaves_the_first_ones_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ds_lightning.plan_picture.draw", lambda *_: None)
    for _ in range(2):
        assert run(PAIR, "--parameters", "1M")[0] == 0
    assert len([*(tmp_path / "out" / "plan").iterdir()]) == 2


def test_commands(capsys, monkeypatch):
    assert command_line.main([]) == 2
    assert "plan" in capsys.readouterr().out
    assert command_line.main(["--help"]) == 0
    assert "plan" in capsys.readouterr().out
    assert command_line.main(["paln"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no command 'paln'")
    assert "'plan'" in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["plan", "--parameters", "1M"])
    assert "--topology" in capsys.readouterr().err

    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_command, "main", interrupt)
    assert command_line.main(["plan"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "ds_lightning", "plan", "--topology", "none.yaml", "--parameters", "1M"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "error: there is no topology none.yaml" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

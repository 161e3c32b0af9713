"""Criteo's format: preparation that is the same however it is run, rows that are refused, synthetic rows."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from recipes.clicks import Criteo, SyntheticCriteo
from recipes.criteo import FIRST, MISSING, RARE, SPLITS, main, prepare
from recipes.criteo_synthetic import Planted, synthesize
from recipes.criteo_text import CATEGORIES, NUMBERS, cut

ROOT = Path(__file__).resolve().parents[1]
ROWS, SHARD = 3000, 500
# The first row of Criteo's own training file.
CRITEO = (
    "0\t1\t1\t5\t0\t1382\t4\t15\t2\t181\t1\t2\t\t2\t68fd1e64\t80e26c9b\tfb936136\t7b4723c4\t25c83c98\t7e0ccccf\t"
    "de7995b8\t1f89b562\ta73ee510\ta8cd5504\tb2cb9c98\t37c9c164\t2824a5f6\t1adce6ef\t8ba8b39a\t891b62e7\te5ba7672\t"
    "f54016b9\t21ddcdc9\tb1252a9d\t07b5194c\t\t3a171ecb\tc5c50484\te8b83407\t9727dd16\n"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.txt"
    synthesize(path, ROWS, seed=0)
    return path


@pytest.fixture(scope="module")
def prepared(text: Path) -> Path:
    out = text.parent / "prepared"
    prepare([text], out, rows_per_shard=SHARD)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tables(folder: Path) -> dict[str, pa.Table]:
    return {split: pq.read_table(folder / split) for split in SPLITS}


def test_the_output_does_not_depend_on_processes(text, prepared, tmp_path):
    prepare([text], tmp_path / "out", processes=4, rows_per_shard=SHARD)
    assert contents(tmp_path / "out") == contents(prepared)
    assert not (prepared / "unfinished").exists()


@pytest.mark.parametrize("where", [1, 499, 500, 1234, 2999])
def test_files_in_order_are_as_their_concatenation(where, text, prepared, tmp_path):
    lines = text.read_bytes().splitlines(keepends=True)
    parts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, part in zip(parts, (lines[:where], lines[where:]), strict=True):
        path.write_bytes(b"".join(part))
    prepare(parts, tmp_path / "out", rows_per_shard=SHARD)
    assert contents(tmp_path / "out") == contents(prepared)


@pytest.mark.parametrize("block", [100, 7777, 1 << 22])
def test_chunks_have_equal_numbers_of_rows_whatever_is_read_at_a_time(block, text, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.criteo_text.BLOCK", block)
    lines = text.read_bytes().splitlines(keepends=True)[:25]
    (tmp_path / "a").write_bytes(b"".join(lines[:13]))
    (tmp_path / "b").write_bytes(b"".join(lines[13:]).removesuffix(b"\n"))  # the last line is a row all the same
    chunks = cut([tmp_path / "a", tmp_path / "b"], 5)
    found = [
        b"".join(Path(segment.path).read_bytes()[segment.start : segment.end] for segment in chunk) for chunk in chunks
    ]
    assert [len(part.splitlines()) for part in found] == [5] * 5
    assert b"".join(found) == b"".join(lines).removesuffix(b"\n")
    assert [(segment.line, Path(segment.path).name) for segment in chunks[2]] == [(11, "a"), (1, "b")]
    assert chunks[3][0].line == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_continues(processes, text, prepared, tmp_path):
    """Killed three times, each time when two more files are there, complete or not."""
    command = [sys.executable, "-m", "recipes.criteo", "prepare", str(text), str(tmp_path / "out")]
    command += ["--rows-per-shard", str(SHARD), "--processes", str(processes)]
    kept = []
    for _ in range(3):
        before = {str(path) for path in tmp_path.rglob("*.*")}
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len({str(path) for path in tmp_path.rglob("*.*")} - before) < 2:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(len(list(tmp_path.rglob("*.*"))))
    assert not (tmp_path / "out" / "criteo.json").exists(), "it was never interrupted"
    assert kept == sorted(kept)
    with pytest.raises(FileNotFoundError, match=r"only half prepared\. HINT: run the same command again"):
        Criteo(str(tmp_path / "out"))
    (tmp_path / "out" / "unfinished" / "counts-1-00000.npy.tmp").write_bytes(b"half written")
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_workers_end_with_their_parent(tmp_path):
    code = (
        "import time; from recipes.criteo import _workers\n"
        "with _workers(2) as map_: list(map_(print_pid, range(2))); time.sleep(60)"
    )
    code = f"import os, time\ndef print_pid(i): os.write(1, b'%d\\n' % os.getpid()); time.sleep(.2)\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rare_categories_are_merged_at_the_threshold(text, prepared):
    described = json.loads((prepared / "criteo.json").read_text())
    encoded = tables(prepared)
    rows = [line.split("\t") for line in text.read_text().splitlines()]
    generator = np.random.Generator(np.random.PCG64(0))
    training = [row for row, draw in zip(rows, generator.random(ROWS), strict=True) if draw < 0.9]
    assert described["rows"]["train"] == len(training) == len(encoded["train"])
    for field, name in enumerate(CATEGORIES):
        values = [row[14 + field] for row in training]
        kept = sorted(value for value, count in Counter(values).items() if count >= 10 and value)
        number = {value: FIRST + i for i, value in enumerate(kept)} | {"": MISSING}
        assert encoded["train"][name].to_pylist() == [number.get(value, RARE) for value in values]
        assert described["categories"][field] == FIRST + len(kept)
    assert encoded["train"]["label"].to_pylist() == [int(row[0]) for row in training]


def test_numbers_are_logarithms_and_missing_ones_have_a_value_of_their_own(tmp_path):
    other = CRITEO.split("\t")
    other[1:4] = ["", "-2", "0"]
    (tmp_path / "rows.txt").write_text(CRITEO + "\t".join(other))
    prepare([tmp_path / "rows.txt"], tmp_path / "out")
    rows = pa.concat_tables(tables(tmp_path / "out").values())
    assert rows["I5"].to_pylist() == [pytest.approx(np.log(1383))] * 2
    assert [rows[name][1].as_py() for name in ("I1", "I2", "I3")] == [-1, 0, 0]
    assert rows["C22"].to_pylist() == [MISSING] * 2
    assert rows["C1"].to_pylist() == [RARE] * 2


def test_nine_tenths_are_trained_on_and_the_draw_is_the_seeds(text, prepared, tmp_path):
    rows = {split: len(table) for split, table in tables(prepared).items()}
    assert sum(rows.values()) == ROWS
    assert rows["train"] / ROWS == pytest.approx(0.9, abs=0.02)
    assert rows["val"] / ROWS == pytest.approx(0.05, abs=0.015)
    again = prepare([text], tmp_path / "out", seed=1, rows_per_shard=SHARD)
    assert again["rows"] != rows or contents(tmp_path / "out") != contents(prepared)
    other = prepare([text], tmp_path / "other", rows_per_shard=700)
    assert other["rows"] == rows
    assert all(tables(tmp_path / "other")[split].equals(tables(prepared)[split]) for split in SPLITS)


def test_hashed_categories_stay_in_their_buckets(text, tmp_path):
    described = prepare([text], tmp_path / "out", hash_buckets=50, rows_per_shard=SHARD)
    assert described["categories"] == [51] * 26
    rows = tables(tmp_path / "out")["train"]
    assert min(min(rows[name].to_pylist()) for name in CATEGORIES) >= 0
    assert max(max(rows[name].to_pylist()) for name in CATEGORIES) == 50


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (None, None, "39 columns, but a row has 40"),
        (0, "2", "label is '2', but must be 0 or 1"),
        (0, "", "label is '', but must be 0 or 1"),
        (0, " 1", "label is ' 1', but must be 0 or 1"),
        (0, "01", "label is '01', but must be 0 or 1"),
        (2, "0x1F", "I2 is '0x1F', but must be an integer"),
        (2, "5 ", "I2 is '5 ', but must be an integer"),
        (2, "9223372036854775807", "I2 is '9223372036854775807', but must be an integer of at most 18 digits"),
        (3, "1.5", "I3 is '1.5', but must be an integer of at most 18 digits or empty"),
        (13, "99999999999999999999", "I13 is '99999999999999999999', but must be an integer"),
        (14, "68fd1e6", "C1 is '68fd1e6', but must be 8 hexadecimal digits or empty"),
        (39, "68fd1e6g", "C26 is '68fd1e6g', but must be 8 hexadecimal digits or empty"),
        (39, "ä8fd1e6", "C26 is .*, but must be 8 hexadecimal digits or empty"),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_malformed_row_is_named(column, value, message, processes, text, tmp_path):
    lines = text.read_text().splitlines()
    row = lines[1233].split("\t")
    row = row[:-1] if column is None else row[:column] + [value] + row[column + 1 :]
    lines[1233] = "\t".join(row)
    bad = tmp_path / "bad.txt"
    bad.write_text("\n".join(lines[1000:]))
    (tmp_path / "good.txt").write_text("\n".join(lines[:1000]))
    files = [str(tmp_path / "good.txt"), str(bad)]
    with pytest.raises(SystemExit, match=rf"^error: {bad}, line 234: {message}.*HINT: repair") as error:
        main(["prepare", *files, str(tmp_path / "out"), "--rows-per-shard", str(SHARD), "--processes", processes])
    assert "\n" not in str(error.value)


def test_what_cannot_be_prepared_is_refused(text, prepared, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.read_bytes()[:1000]))
    for arguments, message in (
        (["nowhere.txt", str(tmp_path / "out")], r"error: no file .*nowhere\.txt\. HINT: name"),
        ([str(tmp_path / "empty.txt"), str(tmp_path / "out")], r"error: .*empty\.txt is empty\. HINT: "),
        ([str(text), str(prepared), "--threshold", "3"], "error: .* holds other rows or options. HINT: delete it"),
        ([str(text), str(text.parent)], "error: .* is not empty. HINT: choose another"),
        ([str(text), str(tmp_path / "out"), "--threshold", "0"], "error: --threshold is 0, but must be at least 1"),
        ([str(text), str(tmp_path / "out"), "--hash-buckets", "0"], "error: --hash-buckets is 0"),
        (
            [str(text), str(tmp_path / "out"), "--hash-buckets", str(2**32)],
            "--hash-buckets is .* at most 2147483646",
        ),
        ([str(text), str(tmp_path / "empty.txt")], r"error: .*empty\.txt is a file\. HINT: name a folder"),
        ([str(tmp_path / "packed.gz"), str(tmp_path / "out")], r"error: .*packed\.gz is compressed\. HINT: gunzip it"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["prepare", *arguments])
    assert not (tmp_path / "out").exists()
    before = contents(prepared)
    assert prepare([text], prepared, rows_per_shard=SHARD)["rows"]["train"] > 0  # done already
    assert contents(prepared) == before


@pytest.mark.parametrize("hashed", [{}, {"hash_buckets": 9}], ids=["numbered", "hashed"])
def test_the_same_command_continues_after_a_row_was_repaired(hashed, text, tmp_path):
    lines = text.read_text().splitlines(keepends=True)
    bad, out, options = tmp_path / "bad.txt", tmp_path / "out", {"rows_per_shard": SHARD, **hashed}
    bad.write_text("".join([*lines[:1500], "2" + lines[1500][1:], *lines[1501:]]))
    with pytest.raises(ValueError, match=r"bad\.txt, line 1501: label is '2'"):
        prepare([bad], out, **options)
    bad.write_text("".join(lines[:1500] + lines[1501:]))
    prepare([bad], out, **options)
    prepare([bad], tmp_path / "undisturbed", **options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_what_an_interruption_after_the_last_step_left_is_removed(text, prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / "unfinished").mkdir()
    prepare([text], out, rows_per_shard=SHARD)
    assert contents(out) == contents(prepared)


def test_half_prepared_rows_of_other_options_are_not_mixed(text, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.criteo._encode", lambda task: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare([text], tmp_path / "out", rows_per_shard=SHARD)
    with pytest.raises(ValueError, match=r"half prepared from other files or with other options\. HINT"):
        prepare([text], tmp_path / "out", rows_per_shard=SHARD, threshold=5)


def test_the_loader_reads_every_row_once(prepared):
    data = Criteo(str(prepared), batch_size=64, num_workers=0)
    data.prepare_data()
    data.setup()
    expected = tables(prepared)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        rows = expected[split]
        batches = list(loader)
        categories, numbers, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        count = len(rows) // 64 * 64 if split == "train" else len(rows)
        assert (categories.shape, numbers.shape, labels.shape) == ((count, 26), (count, 13), (count,))
        columns = [rows[name].to_numpy() for name in ("label", *NUMBERS, *CATEGORIES)]
        there = set(zip(*(column.tolist() for column in columns), strict=True))
        found = torch.cat([labels[:, None], numbers, categories], dim=1).double().tolist()
        assert {tuple(row) for row in found} <= there
    assert isinstance(data.train_set.rows, np.memmap)
    assert not any(name.endswith(".tmp") for name in os.listdir(prepared))
    for path in prepared.glob("*.npy"):
        if path.name != "vocabulary.npy":
            path.unlink()


def test_folders_that_hold_no_prepared_rows_are_refused(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared data in .*HINT: point data\.root"):
        Criteo(str(tmp_path))
    described = json.loads((prepared / "criteo.json").read_text())
    (tmp_path / "criteo.json").write_text(json.dumps(described))
    with pytest.raises(FileNotFoundError, match=r"00000\.parquet is gone\. HINT: copy the whole folder"):
        Criteo(str(tmp_path))
    for broken in ("", "[]", "{}"):
        (tmp_path / "criteo.json").write_text(broken)
        with pytest.raises(ValueError, match=r"criteo\.json is broken\. HINT: copy"):
            Criteo(str(tmp_path))
    (tmp_path / "criteo.json").write_text(json.dumps(described | {"version": 0}))
    with pytest.raises(ValueError, match=r"prepared by version 0, but this is version 1\. HINT"):
        Criteo(str(tmp_path))


def test_synthetic_rows_do_not_depend_on_how_many_are_drawn_at_a_time():
    planted = Planted(3)
    whole = planted.rows(3, 0, 1000)
    parts = [planted.rows(3, first, 250) for first in range(0, 1000, 250)]
    for one, many in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(one, np.concatenate(many), equal_nan=True)


def test_the_bayes_auc_is_that_of_the_planted_probabilities(tmp_path):
    planted = Planted(0)
    labels, _, _, logits = planted.rows(0, 0, 200_000)
    bayes = synthesize(tmp_path / "rows.txt", 200_000, seed=0)
    # The standard error of an AUC of 200,000 rows is 0.0012.
    assert roc_auc_score(labels, logits) == pytest.approx(bayes["auc"], abs=0.004)
    loss = np.mean(np.logaddexp(0, logits) - labels * logits)
    assert loss == pytest.approx(bayes["logloss"], abs=0.005)
    first = [line.split("\t")[0] for line in (tmp_path / "rows.txt").read_text().splitlines()]
    assert first == [str(label) for label in labels]


def test_synthetic_rows_have_heavy_tails_and_gaps():
    _, numbers, categories, _ = Planted(0).rows(0, 0, 50_000)
    assert 0.05 < np.isnan(numbers).mean() < 0.15
    _, counts = np.unique(categories[:, -1][categories[:, -1] >= 0], return_counts=True)
    assert counts.max() > 1000
    assert (counts == 1).sum() > 5000


def test_synthetic_data_are_made_once(tmp_path):
    data = SyntheticCriteo(str(tmp_path), rows=2000, batch_size=16)
    before = contents(tmp_path)
    assert SyntheticCriteo(str(tmp_path), rows=2000, batch_size=16).fields == data.fields
    assert contents(tmp_path) == before
    assert 0.7 < data.bayes["auc"] < 0.9
    with pytest.raises(ValueError, match="--rows is 0"):
        SyntheticCriteo(str(tmp_path), rows=0)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Six shards take about what one takes."""
    code = "import resource, sys; from recipes.criteo import main; main(sys.argv[1:]); print(peak())"
    code = f"def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n{code}"
    peaks = []
    for rows in (50_000, 300_000):
        text = tmp_path / f"{rows}.txt"
        synthesize(text, rows, seed=0)
        arguments = ["prepare", str(text), str(tmp_path / f"out-{rows}"), "--rows-per-shard", "50000"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 120_000  # KiB; 300,000 rows of text alone are 67,000

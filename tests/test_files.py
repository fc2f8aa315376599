"""Files that are whole or absent, locks, worker processes, and how a script ends."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from card import simulated_gpu

from cardiac import files, parallel
from cardiac.files import (
    InputError,
    locked,
    read_csv,
    read_json,
    redo_command,
    replacing,
    write_csv,
    write_json,
    write_text,
)
from cardiac.run import Terminated, choose_device, dataset_identity, describe, run_folder, script
from cardiac.settings import Settings
from cardiac.workers import worker_pool


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------------------- writing


def test_a_file_appears_whole_with_its_folder(tmp_path):
    write_text(tmp_path / "new" / "text.md", "Dice µ\n")
    assert (tmp_path / "new" / "text.md").read_text(encoding="utf-8") == "Dice µ\n"
    assert names(tmp_path / "new") == ["text.md"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Terminated])
def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "labels.nii.gz"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            assert temporary.suffixes == [".nii", ".gz"]
            assert temporary.parent == path.parent
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["labels.nii.gz"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("left behind")
        left = temporary.name
    (tmp_path / left).write_text("left behind by a killed process")
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_text(tmp_path / "a.txt", "text")
    assert order == ["fsync", "replace", "fsync"]


def test_csv_there_and_back(tmp_path):
    rows = [{"case": "A0", "dice": 0.5, "n": 3, "hd": math.nan}]
    rows += [{"case": "B, \"0\"", "dice": 1 / 3}, {"dice": 0.0, "hd": 1e-7 / 3}]
    write_csv(tmp_path / "a.csv", ("case", "dice", "n", "hd"), rows)
    assert read_csv(tmp_path / "a.csv") == [
        {"case": "A0", "dice": "0.500000", "n": "3", "hd": ""},
        {"case": "B, \"0\"", "dice": "0.333333", "n": "", "hd": ""},
        {"case": "", "dice": "0.000000", "n": "", "hd": "0.000000033333"},
    ]
    assert b"\r" not in (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "'A1"])
def test_a_text_is_never_a_formula(tmp_path, text):
    write_csv(tmp_path / "t.csv", ["text"], [{"text": text}])
    assert read_csv(tmp_path / "t.csv") == [{"text": text}]
    write_csv(tmp_path / "a.csv", ("case", "dice"), [{"case": text, "dice": -1.5}])
    with open(tmp_path / "a.csv", newline="") as file:
        _, (cell, number) = csv.reader(file)
    assert cell == "'" + text
    assert number == "-1.500000"


def test_json_there_and_back(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": tmp_path})
    assert read_json(tmp_path / "a.json") == {"b": 1, "a": str(tmp_path)}
    (tmp_path / "a.json").write_text('{"b": ')
    with pytest.raises(InputError, match="not readable as JSON"):
        read_json(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from cardiac.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock and is killed after the test."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path, holder, capsys):
    with pytest.raises(InputError, match="busy there"), locked(tmp_path / ".lock", "busy there"):
        pytest.fail("two hold the lock")
    holder.kill()
    holder.wait()
    with locked(tmp_path / ".lock", "busy there"):
        assert capsys.readouterr().out == ""


def test_waiting_for_a_lock_says_so(tmp_path, holder, capsys):
    signal.signal(signal.SIGALRM, lambda *_: holder.kill())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with locked(tmp_path / ".lock", "waiting for it", wait=True):
        assert capsys.readouterr().out == "waiting for it\n"


# ----------------------------------------------------------------------------------------------- the folder


def case(code, split="Training"):
    return SimpleNamespace(code=code, split=split)


def test_a_folder_is_refused_to_a_second_process(tmp_path):
    settings = Settings(out=tmp_path)
    refused = pytest.raises(InputError, match="another process")
    with run_folder(settings, "registration", []), refused, run_folder(settings, "registration", []):
        pytest.fail("two write there")


def test_a_run_on_other_cases_is_refused_and_overwrite_starts_anew(tmp_path):
    with run_folder(Settings(out=tmp_path), "registration", [case("A")]) as folder:
        (folder / "last.pt").write_text("old")
    with run_folder(Settings(out=tmp_path), "registration", [case("A")]) as folder:
        assert (folder / "last.pt").exists()
    others = [case("A"), case("B")]
    refused = pytest.raises(InputError, match="another dataset")
    with refused, run_folder(Settings(out=tmp_path), "registration", others):
        pytest.fail("mixed two datasets")
    with run_folder(Settings(out=tmp_path, overwrite=True), "registration", others) as folder:
        assert names(folder) == ["config.json"]


def test_a_dataset_is_told_by_splits_and_codes_in_any_order():
    one = [case("A"), case("B", "Testing")]
    assert dataset_identity(one) == dataset_identity(one[::-1])
    assert dataset_identity(one) != dataset_identity([case("A", "Testing"), case("B")])


# ------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_from_as_many_processes(workers):
    with worker_pool(workers, 9) as run:
        assert list(run(pow, ((k, 2) for k in range(9)))) == [k * k for k in range(9)]
        processes = set(run(os.getpid, [()] * 9))
    assert len(processes) <= workers
    assert (os.getpid() in processes) == (workers == 1)


def test_one_job_needs_no_process():
    with worker_pool(8, 1) as run:
        assert list(run(os.getpid, [()])) == [os.getpid()]


def test_no_more_than_two_jobs_a_worker_wait():
    taken = []
    with worker_pool(2, 100) as run:
        results = run(abs, ((taken.append(k) or k,) for k in range(100)))
        for k in range(5):
            next(results)
            assert len(taken) <= k + 1 + 4
        results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_arrives_as_it_is(workers):
    with pytest.raises(ValueError, match="'three'"), worker_pool(workers, 4) as run:
        list(run(int, [("1",), ("2",), ("three",), ("4",)]))


# not guarded by `if __name__ == "__main__"`
WHERE = """
import inspect
from cardiac import parts
from cardiac.workers import worker_pool

with worker_pool(2, 2) as run:
    print(*{parts.__file__, *run(inspect.getfile, [(parts.read_part,)] * 2)})
"""


def test_workers_run_their_parents_package_not_its_program_whatever_the_working_directory(tmp_path):
    (tmp_path / "there" / "cardiac").mkdir(parents=True)
    for name in ("__init__", "parts", "workers"):
        (tmp_path / "there" / "cardiac" / f"{name}.py").write_text("")
    (tmp_path / "parent.py").write_text(WHERE)
    root = Path(files.__file__).parent.parent
    found = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path / "there",
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [str(root / "cardiac" / "parts.py")], found.stderr


PARENT = """
import os, time
from cardiac.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(2, 2) as run:
        results = run(os.getpid, [(), ()])
        print(next(results), next(results), flush=True)
        time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], **quiet)
    workers = {int(word) for word in parent.stdout.readline().split()}
    assert workers
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not any(alive(process) for process in workers):
            return
        time.sleep(0.05)
    pytest.fail("a worker outlived its parent")


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ how a script ends


def raising(error):
    def main(argv):
        raise error

    return script(main)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("case A: bad"), 2, "case A: bad"),
        (InputError("two\nlines: bad"), 2, "two\\nlines: bad"),
        (FileNotFoundError(2, "No such file or directory", "a.nii"), 2, "a.nii: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError(), 2, "a file: OSError"),
        (MemoryError(), 2, "out of memory"),
        (torch.cuda.OutOfMemoryError(), 2, "--batch-size"),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), 2, "--batch-size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, "--batch-size"),
        (RuntimeError("CUDA error: no kernel image is available\nFor debugging"), 2, "available: free"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
    ],
)
def test_what_ends_a_script_is_one_line_and_an_exit_code(error, code, text, capsys):
    assert raising(error)([]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert text in lines[0]


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("CUDA error: device-side assert")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        raising(bug)([])


@pytest.mark.parametrize(
    ("error", "lines"), [(InputError("case A: bad"), 0), (Terminated(), 0), (MemoryError(), 1)]
)
def test_the_first_process_speaks_but_for_what_befalls_another(error, lines, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "RANK", 1)
    raising(error)([])
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_sigterm_ends_a_script_outside_training_too(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert script(lambda argv: signal.raise_signal(signal.SIGTERM))([]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_script_even_where_a_library_makes_another_exception_of_it(capsys, number, code):
    """As matplotlib's resampling does: "Invalid affine transformation matrix"."""

    def main(argv):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ValueError("something else") from error

    assert script(main)([]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_success_is_0():
    assert script(lambda argv: None)([]) == 0


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert describe(torch.device("cpu")).startswith("cpu (")
    with pytest.raises(InputError, match="--device auto"):
        choose_device("cuda")
    with simulated_gpu():
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")


def test_a_card_that_cannot_be_used_is_found_before_any_work(monkeypatch, capsys):
    def zeros(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert script(lambda argv: choose_device("auto"))([]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_more_processes_than_cards_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "LAUNCHED", True)
    monkeypatch.setattr(parallel, "ON_THIS_HOST", 2)
    with pytest.raises(InputError, match="2 processes, but this machine has 1 CUDA"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("runs/registration/config.json", "train_registration.py"),
        ("segmentation/registration/last.pt", "train_registration.py"),
        ("runs/propagation/config.json", "propagate_labels.py"),
        ("segmentation/segmentation/original/best.pt", "train_segmentation.py --labels original"),
        ("runs/segmentation/propagated/config.json", "train_segmentation.py --labels propagated"),
        ("segmentation/evaluation/summary.json", "evaluate.py"),
        ("runs/evaluation/registration/summary.json", "evaluate.py"),
        ("runs/predictions/original/summary.json", "evaluate.py"),
    ],
)
def test_the_command_that_redoes_a_run_whatever_its_folders_are_called(place, command):
    assert redo_command(place) == command

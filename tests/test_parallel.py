"""Data parallel: two processes (gloo, on the CPU) train as one does; a run resumes with another N."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train_registration
import train_segmentation
from cardiac import augment, parallel
from cardiac.files import read_csv
from cardiac.losses import overlap_loss
from cardiac.slices import PairBatch

GRID = [*TINY.split(), "--steps-per-epoch", "4", "--batch-size", "4"]
ROOT = Path(__file__).parent.parent
TIMING = {"seconds", "samples_per_second", "waiting_percent", "memory_gb"}


def torchrun(script, *words):
    """Run a script of the project in two processes; returns what `subprocess.run` does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_registration_in_turn_by_one_process_and_two_is_that_of_one(tiny_data, tmp_path):
    words = ["--data", str(tiny_data), *GRID, "--augment", "--averaging", "0.9"]
    once = [*words, "--out", str(tmp_path / "once"), "--max-steps"]
    parts = [*words, "--out", str(tmp_path / "parts"), "--max-steps"]
    assert train_registration.main([*once, "12"]) == 0
    assert train_registration.main([*parts, "4"]) == 0
    shared = torchrun("train_registration.py", *parts, "8")
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("registration: 8 steps of 4 pairs") == 1, "only the first process prints"
    assert train_registration.main([*parts, "12"]) == 0
    rows = [read_csv(tmp_path / out / "registration" / "log.csv") for out in ("once", "parts")]
    assert [row["step"] for row in rows[1]] == ["4", "8", "12"]
    for one, other in zip(*rows):
        for name in one.keys() - TIMING:  # to the six decimals of the file
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=2e-6), name
    names = ("once", "parts")
    states = [torch.load(tmp_path / out / "registration" / "last.pt", weights_only=True) for out in names]
    for part in ("network", "average"):
        for name, one in states[0][part].items():
            assert torch.allclose(one, states[1][part][name], atol=1e-4), name


def test_two_processes_train_the_segmentation(tiny_data, tmp_path):
    words = ["--data", tiny_data, *GRID, "--out", tmp_path / "run", "--labels", "original"]
    words += ["--channels", "2", "--max-steps", "4", "--augment"]
    shared = torchrun("train_segmentation.py", *words)
    assert shared.returncode == 0, shared.stderr
    assert (tmp_path / "run" / "segmentation" / "original" / "example.png").exists()
    assert train_segmentation.main([*map(str, words), "--max-steps", "8"]) == 0, "a single process resumes"


def test_a_batch_that_the_processes_cannot_share_is_one_line(tiny_data, tmp_path):
    words = ["--data", tiny_data, *GRID[:-1], "5", "--out", tmp_path / "run"]
    shared = torchrun("train_registration.py", *words)
    assert shared.returncode != 0
    lines = [line for line in shared.stderr.splitlines() if line.startswith("train_registration.py")]
    assert lines == ["train_registration.py: --batch-size 5: 2 processes cannot share it equally"]


@pytest.mark.parametrize(("gpu", "backends"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_what_lies_on_the_cpu_travels_with_gloo_wherever_there_is_a_card(gpu, backends, monkeypatch):
    started = []
    monkeypatch.setattr(parallel, "LAUNCHED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda name, timeout: started.append(name))
    with parallel.process_group():
        assert started == [backends]


@pytest.fixture
def as_process(monkeypatch):
    """Let this process be number `rank` of `count`, for its shares of batches."""

    def be(rank, count):
        for module in (parallel, augment):
            monkeypatch.setattr(module, "processes", lambda: count)
        monkeypatch.setattr(parallel, "RANK", rank)

    return be


@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_random_transforms_are_parts_of_the_whole(as_process, count):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 32, 32, generator=generator)
    labels = torch.randint(4, (6, 32, 32), generator=generator).to(torch.uint8)
    trust = 60 * labels.flip(0)
    whole = [augment.augment_slices(images, labels, trust, 3, 5)]
    pairs = PairBatch(images, images.flip(0), labels, labels.flip(0), torch.ones(6, dtype=torch.bool))
    whole.append(vars(augment.augment_pairs(pairs, 3, 5)).values())
    parts = []
    for rank in range(count):
        as_process(rank, count)
        part = PairBatch(*(parallel.share(each) for each in vars(pairs).values()))
        parts.append(
            [
                augment.augment_slices(*map(parallel.share, (images, labels, trust)), 3, 5),
                vars(augment.augment_pairs(part, 3, 5)).values(),
            ]
        )
    for expected, found in zip(whole, zip(*parts)):
        for one, shares in zip(expected, zip(*found)):
            assert torch.allclose(one.float(), torch.cat(shares).float(), atol=1e-6)


def test_the_overlap_of_unequal_shares_averages_to_that_of_the_whole(as_process, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    warped, fixed = torch.rand(2, 4, 3, 8, 8, generator=generator)
    labelled = torch.tensor([True, False, False, False])  # all in the first share
    fixed[0, 2] = 0
    whole = overlap_loss(warped, fixed, labelled)
    stand_in = torch.tensor(2 / 2)  # two regions, two processes
    monkeypatch.setattr(parallel, "process_mean", lambda count: stand_in)
    shares = []
    for rank in range(2):
        as_process(rank, 2)
        shares.append(overlap_loss(*(parallel.share(each) for each in (warped, fixed, labelled))))
    assert sum(shares) / 2 == pytest.approx(whole.item(), rel=1e-6)

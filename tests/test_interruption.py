"""Killed, terminated or out of disk space at any file it writes, a script, rerun, ends as if undisturbed.

Nothing depends on timing: faults, and real signals too, come at the n-th file. tests/faults has kills at
random moments.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import datasets
import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHORT, TINY
from datasets import MMS_CASES, heart
from PIL import Image
from snapshot import content, differences, snapshot

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import building, cache, evaluation, files, propagation, report
from cardiac.checkpoint import write_checkpoint
from cardiac.files import InputError
from cardiac.nifti import write_labels
from cardiac.parts import PARTS, write_part
from cardiac.propagation import Propagated
from cardiac.run import script
from cardiac.settings import Settings

SCRIPTS = {  # folder below OUT: the script that writes it, its options besides data, out, cache and workers
    "registration": (train_registration, [*TINY.split(), *SHORT.split()]),
    "propagation": (propagate_labels, ["--nifti"]),
    "segmentation": (train_segmentation, [*SHORT.split(), "--channels", "2"]),
    "evaluation": (evaluate, []),
}
FIGURE = b"a figure"  # drawing one takes longer than all the rest


@pytest.fixture(scope="module", autouse=True)
def figures_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save_figure", lambda figure, path: files.write_bytes(path, FIGURE))
        for name in ("draw_dice", "draw_bland_altman"):
            patch.setattr(report, name, lambda path, results: files.write_bytes(path, FIGURE))
        yield


@pytest.fixture(scope="module")
def whole(trained_run, tmp_path_factory):
    """(data, out, cache) of an undisturbed run of all four scripts: read it, do not change it."""
    data, trained = trained_run
    out = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(trained, out)
    for path in out.rglob("*.png"):
        path.write_bytes(FIGURE)
    cached = str(trained.parent / "cache")
    for name in ("propagation", "evaluation"):
        assert SCRIPTS[name][0].main(words(name, data, out, cached)) == 0
    return data, out, cached


def words(name, data, out, cached):
    common = ["--data", data, "--out", out, "--cache", cached, "--workers", 1]
    return [str(word) for word in (*common, *SCRIPTS[name][1])]


class Stage:
    """One script, about to be run in an OUT where the scripts before it are finished."""

    def __init__(self, name, whole, tmp_path):
        self.name, (data, self.whole, cached) = name, whole
        self.out, self.folder = tmp_path / "run", tmp_path / "run" / name
        self.module, self.words = SCRIPTS[name][0], words(name, data, self.out, cached)
        for earlier in itertools.takewhile(lambda each: each != name, SCRIPTS):
            shutil.copytree(self.whole / earlier, self.out / earlier)

    def __call__(self):
        return self.module.main(self.words)

    def check(self):
        """Check that everything is as in the undisturbed run, and that nothing else is there."""
        assert differences(snapshot(self.whole / self.name), snapshot(self.folder)) == []
        assert not list(self.out.rglob(".tmp-*"))


@pytest.fixture(params=SCRIPTS)
def stage(request, whole, tmp_path):
    return Stage(request.param, whole, tmp_path)


# ------------------------------------------------------------------------------ a fault at every file


class Killed(BaseException):
    """As if by SIGKILL: nothing is cleaned up on the way out."""


class Disk:
    """The disk of the process under test: the `at`-th file fails, in its middle or just before its rename.

    how: "full" (ENOSPC) or "killed". At every rename, the file is checked to be completely on disk.
    """

    def __init__(self, patch, at=0, where="middle", how="full"):
        self.at, self.where, self.how = at, where, how
        self.count, self.failed, self.dead, self.synced = 0, False, False, {}
        self.replace, self.unlink, self.in_place = os.replace, Path.unlink, Path("none")
        patch.setattr(files.os, "fsync", self.fsync)
        patch.setattr(files.os, "replace", self.checked_replace)
        patch.setattr(Path, "unlink", lambda path, **words: None if self.dead else self.unlink(path, **words))

    def fsync(self, handle):
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return
        self.count += 1
        if self.count == self.at and self.where == "middle":
            os.ftruncate(handle, status.st_size // 2)
            self.fail()
        self.synced[status.st_ino] = status.st_size, status.st_mtime_ns
        if self.in_place.exists() and self.in_place.stat().st_ino == status.st_ino and self.count == self.at:
            self.fail()  # no rename follows

    def checked_replace(self, source, target):
        status = os.stat(source)
        on_disk = self.synced.pop(status.st_ino, None)
        assert on_disk == (status.st_size, status.st_mtime_ns), f"{target} would be lost by a power cut"
        if self.in_place.exists() and self.in_place != source:
            status = self.in_place.stat()
            assert self.synced[status.st_ino] == (status.st_size, status.st_mtime_ns), "not on disk yet"
        if self.count == self.at and self.where == "rename":
            self.fail()
        self.replace(source, target)

    def fail(self):
        self.failed = True
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.dead = True
        raise Killed


FAULTS = list(itertools.product(("middle", "rename"), ("full", "killed")))


def test_a_fault_at_every_file_of_every_script(stage, capsys):
    """The n-th attempt fails at its n-th file, until one finishes."""
    for attempt in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, attempt, *FAULTS[attempt % len(FAULTS)])
            try:
                code = stage()
            except Killed:
                code = None
        if not disk.failed:
            break
        if disk.how == "full":
            assert code == 2
            lines = capsys.readouterr().err.splitlines()
            assert "No space left on device" in lines[-1]
            assert str(stage.out) in lines[-1]
            assert not any("Traceback" in line for line in lines)
        left = [path for path in stage.out.rglob("*") if path.is_file()]
        assert disk.how == "killed" or not [path for path in left if path.name.startswith(".tmp-")]
        for path in left:
            if not path.name.startswith(".tmp-"):
                content(path)  # raises if it is incomplete
    assert code == 0
    assert attempt > 5
    stage.check()


def test_a_fault_at_every_write_of_the_cache(whole, tmp_path):
    """The cache file is written in place: a case's slices must be on disk before it counts as finished."""
    for attempt in itertools.count(1):
        folder = tmp_path / str(attempt)
        settings = Settings(data=whole[0], cache=folder, size=32, spacing=2.0, workers=1)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, attempt, *FAULTS[attempt % len(FAULTS)])
            disk.in_place = folder / ".MnM.h5.parts" / "MnM.h5.building"
            with contextlib.suppress(OSError, Killed):
                cache.open_cache(settings)
        assert disk.failed != (folder / "MnM.h5").exists()
        cache.open_cache(settings)
        assert {each.name for each in folder.iterdir()} == {"MnM.h5", ".MnM.h5.lock"}
        assert content(folder / "MnM.h5") == content(Path(whole[2]) / "MnM.h5")
        if not disk.failed:
            break
    assert attempt > 2 * 7, "two per case"


def test_labels_depend_on_the_weights_and_not_on_the_clock_of_the_registration(whole, tmp_path):
    stage = Stage("propagation", whole, tmp_path)
    path = stage.out / "registration" / "best.pt"
    state = torch.load(path, weights_only=True)
    state["progress"]["seconds"] += 1
    write_checkpoint(path, state)
    assert stage() == 0
    stage.check()


@pytest.mark.parametrize("emptied", [1, 2, 3, 4, 5])
def test_overwrite_killed_while_it_empties_the_folder_leaves_an_unfinished_run(whole, tmp_path, emptied):
    stage = Stage("registration", whole, tmp_path)
    shutil.copytree(whole[1] / "registration", stage.folder)  # a finished run
    unlink, left = Path.unlink, [emptied]

    def unlink_some(path, **words):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        unlink(path, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)
        with pytest.raises(Killed):
            stage.module.main([*stage.words, "--overwrite"])
    assert stage() == 0, "resumes without --overwrite, as the message of an interrupted script says"
    stage.check()


# ------------------------------------------------------------------ finished cases are not done again


def killed_at(patch, module, name, at, done):
    """Let a module's function record the code of each case it gets, and be killed at its `at`-th call."""
    function = getattr(module, name)

    def counted(*arguments):
        done.append(next(each.code for each in arguments if hasattr(each, "code")))
        if len(done) == at:
            raise Killed
        return function(*arguments)

    patch.setattr(module, name, counted)


@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_the_cache_goes_on_with_the_case_at_which_it_was_killed(whole, tmp_path, at):
    words = Settings(data=whole[0], cache=tmp_path, size=32, spacing=2.0, workers=1)
    done = []
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, building, "_preprocess", at, done)
        with pytest.raises(Killed):
            cache.open_cache(words)
        assert not (tmp_path / "MnM.h5").exists()
        cache.open_cache(words)
    killed = done.pop(at - 1)
    assert killed in done
    assert len(done) == len(set(done)) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"MnM.h5", ".MnM.h5.lock"}
    assert content(tmp_path / "MnM.h5") == content(Path(whole[2]) / "MnM.h5")


def replace_all_but_h5(source, target, replace=os.replace):
    """`os.replace`, killed when the cache is to get its final name."""
    if Path(target).suffix == ".h5":
        raise Killed
    replace(source, target)


def exchange(data, code, frames):
    """Replace the files of a case by others with so many frames."""
    tiny = next(tiny for tiny in MMS_CASES if tiny.code == code)
    image, labels = heart((40, 36, 3, frames), tiny.ed, tiny.es, seed=9)
    experts = np.zeros_like(labels)
    if tiny.labelled:
        experts[..., [tiny.ed, tiny.es]] = labels[..., [tiny.ed, tiny.es]]
    for kind, array in (("sa", image.astype(np.int16)), ("sa_gt", experts)):
        datasets.write_nifti(data / tiny.folder / code / f"{code}_{kind}.nii.gz", array)


@pytest.mark.parametrize("code", ["A0A0A0", "D1A1A1", "E2D2D2"])  # the first, one between, the last
@pytest.mark.parametrize("frames", [5, 6, 7])
@pytest.mark.parametrize("size", [32, 48])
def test_a_killed_cache_goes_on_with_what_is_still_the_same_alone(whole, tmp_path, code, frames, size):
    data = shutil.copytree(whole[0], tmp_path / "MnM")
    settings = Settings(data=data, cache=tmp_path / "cache", size=32, spacing=2.0, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, building, "_preprocess", 7, [])
        with pytest.raises(Killed):
            cache.open_cache(settings)
    exchange(data, code, frames)
    settings = dataclasses.replace(settings, size=size)
    found = cache.open_cache(settings)
    fresh = cache.open_cache(dataclasses.replace(settings, cache=tmp_path / "fresh"))
    assert content(found.path) == content(fresh.path)
    assert cache.open_cache(settings) == found, "built again"


def test_what_was_skipped_before_a_kill_and_is_mended_is_not_said_any_more(whole, tmp_path):
    data = shutil.copytree(whole[0], tmp_path / "MnM")
    settings = Settings(data=data, cache=tmp_path / "cache", size=32, spacing=2.0, workers=1, skip_bad=True)
    load = building.load_case

    def refuse(case):
        if case.code == "A0A0A0":
            raise InputError("A0A0A0: not readable for now")
        return load(case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_case", refuse)
        patch.setattr(building.os, "replace", replace_all_but_h5)
        with pytest.raises(Killed):
            cache.open_cache(settings)
    found = cache.open_cache(settings)
    assert found.skipped == ()
    assert len(found.cases) == 7
    assert cache.open_cache(settings) == found


RUNS = {
    "registration": (propagation, "_to_own_grid", 4),
    "propagation": (propagate_labels, "propagate_case", 2),
    "evaluation": (evaluation, "_write_and_score", 4),
}


def unfinished(name, whole, tmp_path):
    """A stage whose networks are trained but not scored."""
    stage = Stage(name, whole, tmp_path)
    if name == "registration":
        shutil.copytree(stage.whole / name, stage.folder)
        (stage.folder / "quality.csv").unlink()
    return stage


@pytest.mark.parametrize(
    ("name", "at"), [(name, at + 1) for name, run in RUNS.items() for at in range(run[2])]
)
def test_a_killed_run_goes_on_with_the_case_at_which_it_was_killed(whole, tmp_path, name, at):
    stage, (module, function, count) = unfinished(name, whole, tmp_path), RUNS[name]
    done = []
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, module, function, at, done)
        with pytest.raises(Killed):
            stage()
        assert len(list((stage.folder / PARTS).rglob("?*-*"))) == at - 1
        assert stage() == 0
    assert len(done) == count + 1, "only the unfinished case was done twice"
    stage.check()
    assert stage() == 0, "finished"
    stage.check()


def test_workers_do_not_matter_for_the_quality_of_the_registration(whole, tmp_path):
    stage = unfinished("registration", whole, tmp_path)
    stage.words[stage.words.index("--workers") + 1] = "2"
    assert stage() == 0
    assert content(stage.folder / "quality.csv") == content(stage.whole / "registration" / "quality.csv")


def test_scores_of_other_weights_are_not_gone_on_with(whole, tmp_path):
    """The same number of steps, the same best score; only the weights differ."""
    stage, done = unfinished("evaluation", whole, tmp_path), []
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, evaluation, "_write_and_score", 4, done)
        with pytest.raises(Killed):
            stage()
    for model in ("original", "propagated"):
        path = stage.out / "segmentation" / model / "best.pt"
        state = torch.load(path, weights_only=True)
        state["network"][list(state["network"])[-1]][2] += 99  # the last bias: myocardium everywhere
        write_checkpoint(path, state)
    shutil.copytree(stage.out, tmp_path / "fresh", ignore=shutil.ignore_patterns("evaluation"))
    assert stage() == 0
    stage.words[stage.words.index(str(stage.out))] = str(tmp_path / "fresh")
    assert stage() == 0
    assert differences(snapshot(tmp_path / "fresh" / "evaluation"), snapshot(stage.folder)) == []
    assert differences(snapshot(stage.whole / "evaluation"), snapshot(stage.folder)) != []


def test_a_finished_run_removes_what_a_kill_at_its_very_end_left(whole, tmp_path):
    stage = Stage("evaluation", whole, tmp_path)
    shutil.copytree(stage.whole / "evaluation", stage.folder)
    write_part(stage.folder / PARTS / "original" / "E1A1A1-0", {})
    assert stage() == 0
    stage.check()


def test_overwrite_starts_anew(whole, tmp_path):
    stage, done = unfinished("evaluation", whole, tmp_path), []
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, evaluation, "_write_and_score", 4, done)
        with pytest.raises(Killed):
            stage()
        stage.words.append("--overwrite")
        assert stage() == 0
    assert len(done) == 4 + 4


# --------------------------------------------------------------- what the libraries do without disk space


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def write_gif(path):
    pictures = [Image.fromarray(noise(64, 64)) for _ in range(3)]
    with files.replacing(path) as temporary:
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:])


def write_nifti(path):
    like = path.with_name("like.nii")
    write_labels(path, noise(20, 20, 20), like)


def write_propagated(path):
    Propagated(noise(9, 32, 32) % 4, [("A0", 1, z) for z in range(9)], np.ones(9)).write(path, "x")


def build_cache(data, folder):
    cache.open_cache(Settings(data=data, cache=folder, size=32, spacing=2.0, workers=1))


WRITERS = {
    "last.pt": lambda path: write_checkpoint(path, {"weights": torch.rand(5000)}),
    "labels.h5": write_propagated,
    "A0.nii.gz": write_nifti,
    "cine.gif": write_gif,
    "cases.csv": lambda path: files.write_csv(path, ["case"], [{"case": "A0"}] * 2000),
    "MnM.h5": None,
    "A0-part": lambda path: write_part(path, {"labels": np.arange(4500, dtype=np.uint8)}),
    "A0-scores": lambda path: write_part(path, {"scores": "0" * 4100}),
}


@pytest.mark.parametrize("room", [0, 700, 4000])
@pytest.mark.parametrize("name", WRITERS)
def test_without_room_every_writer_names_its_file_and_leaves_the_old_one(whole, tmp_path, capsys, name, room):
    """A limit on the size of files stands for a full disk: the same write calls fail."""
    nib.save(nib.Nifti1Image(noise(20, 20, 20), np.eye(4)), tmp_path / "like.nii")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("old")
    write = WRITERS[name] or (lambda path: build_cache(whole[0], path.parent))
    shutil.copy(tmp_path / "like.nii", folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        code = script(lambda argv: write(folder / name))([])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.search(rf"{name}(\.building)?: File too large$", lines[-1])
    assert (folder / name).read_text() == "old"
    assert not list(folder.glob(".tmp-*"))
    assert script(lambda argv: write(folder / name))([]) == 0
    assert (folder / name).read_bytes() != b"old"


# -------------------------------------------------------------------------------- real processes and signals

CHILD = """
import os, sys
import {module}
number, at = int(sys.argv[1]), int(sys.argv[2])
replace, count = os.replace, 0

def counted(source, target):
    global count
    count += 1
    if count == at:
        print("here", flush=True)
        os.kill(os.getpid(), number) if number else sys.stdin.readline()
    replace(source, target)

os.replace = counted
sys.exit({module}.main(sys.argv[3:]))
"""


def process(stage, number, at):
    """The script as a process that sends itself a signal at its `at`-th rename or, if 0, waits there."""
    code = CHILD.format(module=stage.module.__name__)
    command = [sys.executable, "-c", code, str(number), str(at), *stage.words]
    path = os.pathsep.join([str(Path(stage.module.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes)


KILLS = [
    ("propagation", signal.SIGKILL, 5, -signal.SIGKILL, ""),
    ("segmentation", signal.SIGTERM, 5, 143, "terminated; the same command resumes from here"),
    ("evaluation", signal.SIGINT, 9, 130, "interrupted; the same command resumes from here"),
]


@pytest.mark.parametrize(("name", "number", "at", "code", "says"), KILLS)
def test_a_real_signal(whole, tmp_path, name, number, at, code, says):
    stage = Stage(name, whole, tmp_path)
    child = process(stage, number, at)
    _, errors = child.communicate()
    assert child.returncode == code
    assert says in errors.splitlines()[-1] if says else "Traceback" not in errors
    assert stage() == 0
    stage.check()


def test_a_second_run_in_the_folder_is_refused_and_a_killed_one_leaves_no_lock(whole, tmp_path, capsys):
    stage = Stage("registration", whole, tmp_path)
    first = process(stage, 0, 5)
    while first.stdout.readline() != "here\n":
        assert first.poll() is None
    assert stage() == 2
    assert f"{stage.folder}: another process is writing there" in capsys.readouterr().err
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert list(stage.folder.glob(".tmp-*")), "it was not killed in the middle of a file"
    assert stage() == 0
    stage.check()


BUILDER = """
import sys
from pathlib import Path
from cardiac import cache
from cardiac.settings import Settings
build = cache.build

def slow(*arguments):
    print("building", flush=True)
    sys.stdin.readline()
    build(*arguments)

cache.build = slow
cache.open_cache(Settings(data=Path(sys.argv[1]), cache=Path(sys.argv[2]), size=32, spacing=2.0, workers=1))
"""


def test_two_that_want_the_same_cache_build_it_once(whole, tmp_path, monkeypatch):
    root = str(Path(evaluate.__file__).parent)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    command = [sys.executable, "-c", BUILDER, str(whole[0]), str(tmp_path)]
    other = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, **pipes)
    while other.stdout.readline() != "building\n":
        assert other.poll() is None
    said = []

    def release(text, **_):
        said.append(text)
        other.stdin.write("\n")
        other.stdin.close()

    monkeypatch.setattr(files, "print", release, raising=False)  # printed when the lock is found taken
    monkeypatch.setattr(cache, "build", lambda *_: pytest.fail("built twice"))
    found = cache.open_cache(Settings(data=whole[0], cache=tmp_path, size=32, spacing=2.0, workers=1))
    assert "waiting for another process" in said[0]
    with h5py.File(found.path) as file:
        assert file["images"].shape[1:] == (32, 32)
    assert other.wait() == 0

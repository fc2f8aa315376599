"""Bad input to the four scripts: one line that names the fault, exit code 2, nothing half-written.

tests/test_cases.py has every fault of a dataset at the readers, test_training.py every hostile checkpoint at
the training loop, test_settings.py the single options.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import SHORT
from datasets import TABLE, Tiny, write_mms, write_table
from snapshot import differences, snapshot
from test_cases import DATASET_FAULTS, HEADER_FAULTS, VOXEL_FAULTS, put

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import cache
from cardiac.checkpoint import read_checkpoint, write_checkpoint
from cardiac.files import InputError, read_csv
from cardiac.layouts import read_cases
from cardiac.parts import PARTS
from cardiac.propagation import Propagated
from cardiac.run import script
from cardiac.settings import Settings

pytestmark = pytest.mark.usefixtures("no_pictures")
SCRIPTS = {  # the folder that each writes, its further options
    train_registration: ("registration", [*SHORT.split(), "--size", "32", "--spacing", "2"]),
    propagate_labels: ("propagation", []),
    train_segmentation: ("segmentation", [*SHORT.split(), "--channels", "2"]),
    evaluate: ("evaluation", []),
}
MODULES = pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
CODE = "A0A0A0"
FOLDER = f"Training/Labeled/{CODE}/{CODE}"


class Run:
    """A copy of the shared run and of its data, to be damaged."""

    def __init__(self, trained_run, folder, module=None):
        data, out = trained_run
        self.data, self.out, self.cache = folder / "MnM", folder / "run", folder / "cache"
        shutil.copytree(data, self.data)
        for path in self.data.rglob("*.gz"):  # other names than the shared run's, whose cache is not touched
            os.utime(path)
        shutil.copytree(out, self.out)
        if module:
            shutil.rmtree(self.out / SCRIPTS[module][0], ignore_errors=True)

    def __call__(self, module, *words):
        common = ["--data", self.data, "--out", self.out, "--workers", 1, *SCRIPTS[module][1]]
        return module.main([str(word) for word in (*common, *words)])

    def image(self, what="sa"):
        return self.data / f"{FOLDER}_{what}.nii.gz"


@pytest.fixture
def run(trained_run, tmp_path):
    return Run(trained_run, tmp_path)


@pytest.fixture
def refused(capsys):
    """`refused(code, *parts)`: checks for exit code 2 and one line on stderr that contains all parts."""

    def check(code, *parts):
        found = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in found if line.strip() and "/s]" not in line]  # progress bars left out
        assert code == 2
        assert len(lines) == 1, lines
        for part in parts:
            assert str(part) in lines[0]

    return check


def results(folder):
    """Files that have their final name: no locks, no parts of finished cases."""
    found = {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}
    return {path for path in found if not any(each.endswith(PARTS) for each in path.parts)}


# -------------------------------------------------------------------------------- datasets, by every script


FAULTS = [*HEADER_FAULTS, *VOXEL_FAULTS, *DATASET_FAULTS]


@pytest.mark.parametrize(("spoil", "says"), [pytest.param(*fault[1:], id=fault[0]) for fault in FAULTS])
def test_a_bad_dataset_is_named_by_every_script(run, refused, spoil, says):
    before = snapshot(run.out)
    spoil(run.data)
    for module in SCRIPTS:
        refused(run(module), says)
    assert snapshot(run.out) == before
    assert not run.cache.exists() or results(run.cache) == set()


@MODULES
def test_the_same_dataset_without_the_fault_is_accepted(trained_run, tmp_path, module):
    run = Run(trained_run, tmp_path, module)
    assert run(module) == 0
    assert {path.name for path in results(run.cache)} == {"MnM.h5"}
    assert results(run.out / SCRIPTS[module][0])


def test_skip_bad_goes_on_and_the_report_lists_the_case(trained_run, tmp_path, capsys, refused):
    """Testing may be unpacked after training and be bad: then --skip-bad is first given to evaluate.py."""
    run = Run(trained_run, tmp_path)
    (run.data / "Testing/E1A1A1/E1A1A1_sa_gt.nii.gz").unlink()
    put(run.data / "Validation/D2C2C2/D2C2C2_sa.nii.gz", ..., 7)
    refused(run(evaluate), "E1A1A1", "--skip-bad")
    assert run(evaluate, "--skip-bad") == 0
    folder = run.out / "evaluation"
    assert {row["case"] for row in read_csv(folder / "cases.csv")} == {"E2D2D2"}
    for name in ("table.md", "report.html"):
        text = (folder / name).read_text()
        assert "2 left out with --skip-bad: E1A1A1: " in text
        assert "D2C2C2: " in text
    assert capsys.readouterr().out.count("skipped: ") == 2


# ------------------------------------------------------------------------------------------------ bad options


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "run", "is not a writable folder"


def no_room(tmp_path):
    return "/proc/run", "/proc/"


@MODULES
@pytest.mark.parametrize("place", [below_a_file, no_room])
def test_an_out_or_cache_that_cannot_be_written(run, tmp_path, refused, module, place):
    where, says = place(tmp_path)
    if place is below_a_file or module is train_registration:  # the others would miss earlier runs there
        refused(run(module, "--out", where), says)
    refused(run(module, "--cache", where), says)


@MODULES
def test_values_that_do_not_fit_are_refused_by_every_script(run, refused, module):
    before = snapshot(run.out)
    for words in ("--size 100", "--spacing 0", "--seed -1", "--workers -2"):
        refused(run(module, "--overwrite", *words.split()), words.split()[0])
    assert snapshot(run.out) == before
    assert not run.cache.exists()


@MODULES
def test_cuda_asked_for_where_there_is_none(run, refused, monkeypatch, module):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = snapshot(run.out)
    refused(run(module, "--device", "cuda"), "--device cuda", "--device auto")
    assert snapshot(run.out) == before


def test_more_memory_than_there_is(run, refused):
    shutil.rmtree(run.out / "registration")
    words = ["--batch-size", 10**13]
    refused(run(train_registration, *words), "out of memory", "--batch-size")


@pytest.mark.parametrize("module", [train_registration, train_segmentation])
def test_more_steps_than_there_were_are_fine(run, module):
    assert run(module, "--max-steps", "5") == 0


@pytest.mark.parametrize("module", [train_registration, train_segmentation])
def test_fewer_steps_than_there_were_change_nothing(run, module, capsys):
    assert run(module, "--max-steps", "4") == 0
    before = snapshot(run.out)
    assert run(module, "--max-steps", "3") == 0
    assert snapshot(run.out) == before, "config.json still has what the run was trained with"
    said = capsys.readouterr().out
    assert "finished at step 4" in said
    assert "resuming" not in said


# --------------------------------------------------------------------------------- runs that are not this one


@MODULES
def test_the_output_of_another_dataset_is_not_gone_on_with(run, tmp_path, refused, module):
    if module is evaluate:  # which scores any dataset, in a folder of its own: see test_evaluation.py
        shutil.copytree(run.out / "propagation", run.out / "evaluation")
        config = run.out / "evaluation" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dataset": "another"}))
    else:
        cases = [Tiny("X0"), Tiny("X1"), Tiny("X2", "Validation")]
        run.data = write_mms(tmp_path / "other", cases)
    before = snapshot(run.out)
    refused(run(module), SCRIPTS[module][0], "another dataset", "--overwrite")
    assert differences(before, snapshot(run.out)) in ([], ["only in the second: .evaluation.lock"])


@pytest.mark.parametrize("change", ["another dataset", "a corrected label"])
def test_propagated_labels_of_other_cases_are_not_trained_on(run, refused, tmp_path, change):
    shutil.rmtree(run.out / "segmentation")
    if change == "a corrected label":
        put(run.image("sa_gt"), (slice(4), slice(4), 1, 0), 2)
    else:  # propagated by this run's registration
        mine, run.data = run.data, write_mms(tmp_path / "other", [Tiny("X0"), Tiny("X1", "Testing")])
        assert run(propagate_labels, "--overwrite") == 0
        run.data = mine
    refused(run(train_segmentation), "labels.h5", "made from Training cases", "run propagate_labels.py")
    assert run(train_segmentation, "--labels", "original") == 0
    assert not (run.out / "segmentation" / "propagated").exists()
    assert run(propagate_labels, *(["--overwrite"] if change == "another dataset" else [])) == 0
    assert run(train_segmentation) == 0


def test_a_run_on_labels_that_were_mended_since_is_not_gone_on_with(run, refused, capsys):
    put(run.image("sa_gt"), (slice(4), slice(4), 1, 0), 2)
    assert run(propagate_labels) == 0, "redone"
    before = snapshot(run.out)
    for module in (train_registration, train_segmentation):
        refused(run(module, "--max-steps", 9), "changed or been added; use --overwrite or choose")
    words = ["--labels", "propagated", "--overwrite"]
    refused(run(train_segmentation, *words), "segmentation/original", "use --labels both --overwrite")
    assert differences(before, snapshot(run.out)) == []
    assert run(train_segmentation, "--overwrite") == 0
    assert run(train_segmentation, *words, "--lr", 0.01) == 0
    assert run(evaluate) == 0
    caption = (run.out / "evaluation" / "table.md").read_text()
    assert "BESIDES THEIR LABELS, THE NETWORKS DIFFER IN lr (0.001, 0.01)." in caption
    config = run.out / "segmentation" / "propagated" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cases": "others"}))
    capsys.readouterr()
    refused(run(evaluate), "segmentation", "not trained on the same cases")


def test_a_second_model_of_another_dataset_goes_where_both_are_made_anew(run, tmp_path, refused, capsys):
    cases = [Tiny("X0", es=1), Tiny("X1", "Validation", es=1), Tiny("X2", "Testing", es=1)]
    run.data = write_mms(tmp_path / "two", cases, shape=(40, 36, 3, 2))
    for module in (train_registration, propagate_labels):
        assert run(module, "--overwrite") == 0
    capsys.readouterr()
    refused(run(train_segmentation, "--labels", "original", "--overwrite"), "use --labels both --overwrite")
    assert run(train_segmentation, "--overwrite") == 0, "nothing lies between two frames: only original"
    assert not (run.out / "segmentation" / "propagated" / "best.pt").exists()
    assert run(evaluate) == 0


def test_what_overwrite_was_to_train_anew_is_not_found_finished_later(run, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    old = (run.out / "segmentation" / "propagated" / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train_segmentation, "fit", interrupted)
        assert run(train_segmentation, "--overwrite", "--lr", 0.01) == 130
    assert "without --overwrite" in capsys.readouterr().err
    assert run(train_segmentation) == 0, "with the previous --lr"
    assert (run.out / "segmentation" / "propagated" / "last.pt").read_bytes() != old


def test_a_validation_that_has_gone_does_not_change_what_is_trained_on(run, refused):
    before = snapshot(run.out)
    shutil.rmtree(run.data / "Validation")
    for module in (train_registration, train_segmentation):
        refused(run(module, "--max-steps", "9"), "validated on cases of Validation, which are now missing")
    assert differences(before, snapshot(run.out)) == []
    assert run(evaluate) == 0
    assert "2 patients" in (run.out / "evaluation" / "table.md").read_text()


@MODULES
def test_another_recipe_in_the_folder(run, refused, module):
    refused(run(module, "--recipe", "strong"), "--recipe strong contradicts --recipe paper", run.out)


def wrong_weights(run):
    """Put the registration's weights in the place of a segmentation's; returns the folder."""
    folder = run.out / "segmentation" / "original"
    state = torch.load(run.out / "registration" / "last.pt", weights_only=True)
    for name in ("last.pt", "best.pt"):
        write_checkpoint(folder / name, state)
    return folder


def test_a_checkpoint_of_another_architecture(run, refused):
    folder = wrong_weights(run)
    refused(run(train_segmentation, "--max-steps", 5), folder, "another architecture")
    refused(run(evaluate), folder, "another architecture")
    assert run(train_registration) == 0
    shutil.copy(run.out / "segmentation/propagated/best.pt", run.out / "registration" / "best.pt")
    refused(run(propagate_labels), run.out / "registration" / "best.pt", "another architecture")


@pytest.mark.parametrize("value", ["<b>", None, [1], {}])
def test_a_config_of_a_stranger(run, refused, value):
    path = run.out / "registration" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["size"] = value
    path.write_text(json.dumps(config))
    refused(run(propagate_labels), run.out)


@pytest.mark.parametrize("text", ["{", '{"settings": 1}'])
@pytest.mark.parametrize(
    ("place", "reader", "writer", "words"),
    [
        ("registration", propagate_labels, train_registration, []),
        ("propagation", propagate_labels, propagate_labels, []),
        ("segmentation/original", evaluate, train_segmentation, ["--labels", "original"]),
    ],
)
def test_a_damaged_config_names_the_script_that_makes_its_run_anew(
    run, refused, place, reader, writer, words, text
):
    config = run.out / place / "config.json"
    config.write_text(text)
    advice = " ".join([f"{writer.__name__}.py", *words, "--overwrite redoes it"])
    refused(run(reader), config, f"; {advice}")
    assert run(writer, *words, "--overwrite") == 0
    assert run(reader) == 0


# ---------------------------------------------------------------------------------------------- hostile files


class Evil:
    """Creates a folder when unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path("executed").absolute()),)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (train_registration, "registration/last.pt"),
        (propagate_labels, "registration/best.pt"),
        (train_segmentation, "segmentation/original/last.pt"),
        (evaluate, "segmentation/propagated/last.pt"),
        (evaluate, "segmentation/propagated/best.pt"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_is_not_executed(run, refused, tmp_path, monkeypatch, module, name, old):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), run.out / name, _use_new_zipfile_serialization=not old)
    refused(run(module), run.out / name, "not a checkpoint of this program")
    assert not (tmp_path / "executed").exists()


def test_a_missing_best_checkpoint_is_said_and_not_passed_over(run, refused, capsys):
    best = run.out / "segmentation" / "original" / "best.pt"
    best.unlink()
    anew = "train_segmentation.py --labels original --overwrite retrains it"
    refused(run(train_segmentation), best, f"missing; restore it, or {anew}")
    assert run(evaluate) == 0
    assert "original: not finished" in capsys.readouterr().out


def test_a_checkpoint_that_unpacks_to_more_than_it_is(trained_run, tmp_path):
    source, packed = trained_run[1] / "registration" / "last.pt", tmp_path / "packed.pt"
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bad:
        for part in good.infolist():
            bad.writestr(part.filename, good.read(part))
    assert torch.load(packed, weights_only=True)["progress"], "torch itself would unpack it"
    with pytest.raises(InputError, match="unpacks to more than its size"):
        read_checkpoint(packed, torch.device("cpu"))
    assert read_checkpoint(source, torch.device("cpu"))


def external(path, name, secret):
    """Replace a dataset by a link to one in another file."""
    with h5py.File(secret, "w") as file:
        file["data"] = np.zeros((4, 32, 32), np.uint8)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(secret), "data")


def soft(path, name, secret):
    with h5py.File(path, "a") as file:
        file.move(name, "moved")
        file[name] = h5py.SoftLink("/moved")


def raw(path, name, secret):
    """A dataset whose bytes are in another file, of any kind."""
    secret.write_bytes(b"s" * 4096)
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, (4, 32, 32), np.uint8, external=[(str(secret), 0, 4096)])


def virtual(path, name, secret):
    with h5py.File(secret, "w") as file:
        file["data"] = np.zeros((4, 32, 32), np.uint8)
    layout = h5py.VirtualLayout((4, 32, 32), np.uint8)
    layout[:] = h5py.VirtualSource(str(secret), "data", (4, 32, 32))
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_virtual_dataset(name, layout)


def absurd(path, name, secret):
    """Petabytes, none of which was ever written."""
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, (10**9, 1024, 1024), np.uint8, chunks=(1, 1024, 1024))


def packed(path, name, secret):
    """A gigabyte of zeros in a megabyte."""
    with h5py.File(path, "a") as file:
        del file[name]
        words = {"chunks": (1024, 32, 32), "compression": "gzip", "fillvalue": 0}
        file.create_dataset(name, (2**20, 32, 32), np.uint8, **words)


def text(path, name, secret):
    """Text of variable length: every element may point to the same megabytes."""
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = ["x" * 1000] * 10


HDF5 = pytest.mark.parametrize("spoil", [external, soft, raw, virtual, absurd, packed, text])


@HDF5
@pytest.mark.parametrize("name", ["images", "labels", "cases", "sources", "skipped"])
def test_a_hostile_cache_is_built_again(tiny_data, tmp_path, capsys, monkeypatch, spoil, name):
    settings = Settings(data=tiny_data, cache=tmp_path / "cache", size=32, spacing=2.0, workers=1)
    path = cache.open_cache(settings).path
    before = snapshot(settings.cache)
    spoil(path, name, tmp_path / "secret")
    capsys.readouterr()
    cache.open_cache(settings)
    assert "cache: building" in capsys.readouterr().out
    assert snapshot(settings.cache) == before
    cache.open_cache(settings)
    assert "cache: building" not in capsys.readouterr().out, "the good one is not rebuilt"


@HDF5
@pytest.mark.parametrize("name", ["labels", "case", "confidence"])
def test_hostile_propagated_labels_are_refused(trained_run, tmp_path, refused, spoil, name):
    path = tmp_path / "labels.h5"
    shutil.copy(trained_run[1] / "propagation" / "labels.h5", path)
    assert len(Propagated.read(path).labels)
    spoil(path, name, tmp_path / "secret")
    refused(script(lambda argv: Propagated.read(path))([]), path, "not readable", "propagate_labels.py")


def test_propagated_labels_that_no_label_has(tmp_path):
    Propagated(np.full((1, 8, 8), 4, np.uint8), [("A", 1, 0)], [1.0]).write(tmp_path / "labels.h5", "x")
    with pytest.raises(InputError, match="do not fit"):
        Propagated.read(tmp_path / "labels.h5")


CODES = ["../../escape", "a/b", "a,b", 'a"b', "a\nb", "<b>x</b>", "=1+1", "@SUM(A1)"]


@MODULES
def test_hostile_codes_are_refused_and_nothing_leaves_out(run, tmp_path, refused, module):
    with open(run.data / TABLE, "a", newline="") as file:
        csv.writer(file).writerows((9, code, "Siemens", "A", 1, 0, 2) for code in CODES)
    before = snapshot(tmp_path)
    refused(run(module), TABLE, CODES[0], "is not made of letters", f"and {len(CODES) - 1} more")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("code", ["patient<b>", "patient,1", "=patient", "patient\n1"])
def test_hostile_folders_of_acdc(tmp_path, code):
    (tmp_path / "training" / code).mkdir(parents=True)
    (tmp_path / "training" / "patient001").mkdir()
    (problem,) = [line for line in read_cases(tmp_path).problems if "letters" in line]
    assert "\n" not in problem


def test_a_hostile_name_is_text_in_the_report_and_the_tables(trained_run, tmp_path):
    """A code may begin with '-', which a spreadsheet takes for a formula, and a folder may have any name."""
    out, name = tmp_path / "run", "</script><img src=x onerror=alert(1)>"
    shutil.copytree(trained_run[1], out)
    cases = [Tiny("-1", "Testing"), Tiny("X1"), Tiny("X2", "Testing")]
    data = write_mms(tmp_path / name.replace("/", "\\"), cases)
    write_table(data / TABLE, cases)
    words = ["--data", str(data), "--out", str(out), "--cache", str(tmp_path / "cache"), "--workers", "1"]
    assert evaluate.main(words) == 0
    (folder,) = [path.parent for path in (out / "evaluation").rglob("report.html")]
    assert "<img src=x" not in (folder / "report.html").read_text()
    lines = (folder / "cases.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines[1:]} == {"'-1", "X2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", "cache", data.name])


# ------------------------------------------------------------------------------------------ as real processes


def process(module, *words):
    path = Path(module.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path.parent)}
    command = [sys.executable, path, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


PROCESSES = [
    (train_registration, ["--size", "100"], "--size 100"),
    (propagate_labels, [], "best.pt: there is no such checkpoint; run train_registration.py first"),
    (train_segmentation, [], "there are no propagated labels; run propagate_labels.py first"),
    (evaluate, [], "no finished model; run train_segmentation.py first"),
]


@pytest.mark.parametrize(("module", "words", "says"), PROCESSES)
def test_as_a_real_process(tiny_data, tmp_path, module, words, says):
    found = process(module, "--data", tiny_data, "--out", tmp_path / "run", *words)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith(f"{module.__name__}.py: ")
    assert says in found.stderr
    assert not (tmp_path / "run").exists()


def test_differences_are_seen():
    """What the tests of interruption rely on."""
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "only in the first: a", "only in the second: c", "different: b",
    ]

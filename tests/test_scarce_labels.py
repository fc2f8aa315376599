"""Withheld labels: no training script sees them, whatever they contain."""

import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHORT, TINY
from datasets import MMS_CASES

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac.cache import open_cache
from cardiac.files import read_csv
from cardiac.propagation import Propagated
from cardiac.settings import RegistrationSettings

pytestmark = pytest.mark.usefixtures("no_pictures")
SCRIPTS = (train_registration, propagate_labels, train_segmentation, evaluate)


def run(data, out, *words, scripts=SCRIPTS[:3]):
    """Run `scripts` in order; `words` are given to the first and taken from its run by the others."""
    for script in scripts:
        own = [*TINY.split(), *words] if script is train_registration else ["--workers", "1"]
        if script in (train_registration, train_segmentation):
            own += SHORT.split()
        if script is train_segmentation:
            own += ["--channels", "2"]
        assert script.main(["--data", str(data), "--out", str(out), *own]) == 0


def weights(out, place):
    return torch.load(out / place / "last.pt", weights_only=True)["network"]


def spoil(data, phase, keep=()):
    """Mirror the expert labels of one phase in Training and Validation, except for the cases `keep`."""
    for case in MMS_CASES:
        if case.labelled and not case.folder.startswith("Testing") and case.code not in keep:
            path = data / case.folder / case.code / f"{case.code}_sa_gt.nii.gz"
            file = nib.load(path)
            labels = np.asarray(file.dataobj).copy()
            frame = case.ed if phase == "ED" else case.es
            labels[..., frame] = labels[::-1, ..., frame]
            nib.save(nib.Nifti1Image(labels, file.affine), path)


@pytest.mark.parametrize(("known", "withheld"), [("ED", "ES"), ("ES", "ED")])
@pytest.mark.parametrize("recipe", ["paper", "strong"])
def test_no_training_script_sees_the_labels_of_the_other_phase(known, withheld, recipe, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "spoilt" / "MnM")
    spoil(tmp_path / "spoilt" / "MnM", withheld)
    found = []
    for name, data in (("right", tiny_data), ("spoilt", tmp_path / "spoilt" / "MnM")):
        run(data, tmp_path / name / "run", "--labelled-phases", known, "--recipe", recipe)
        found.append(tmp_path / name / "run")
    for place in ("registration", "segmentation/original", "segmentation/propagated"):
        one, other = (weights(out, place) for out in found)
        assert all(torch.equal(one[name], other[name]) for name in one), place
    one, other = (Propagated.read(out / "propagation" / "labels.h5") for out in found)
    assert np.array_equal(one.labels, other.labels)
    case = next(case for case in MMS_CASES if case.code == "B0B0B0")
    frames = {frame for code, frame, _ in one.where if code == case.code}
    assert (case.es if known == "ED" else case.ed) in frames, "the phase whose label is withheld is labelled"
    assert (case.ed if known == "ED" else case.es) not in frames
    columns = read_csv(found[0] / "propagation" / "quality.csv")
    assert {row["source"] for row in columns} - {""} == {known}
    shown = []
    for out, data in zip(found, (tiny_data, tmp_path / "spoilt" / "MnM")):
        run(data, out, scripts=SCRIPTS[3:])
        page = (out / "evaluation" / "report.html").read_text()
        assert f"Trained on expert labels of {known} only, 2 patients, of vendor A, B;" in page
        shown.append(re.search('id="propagation-data">(.*?)</script>', page)[1])
    assert shown[0] == shown[1], "the report shows what was propagated, not the expert's withheld label"


def test_spoilt_labels_are_noticed_where_they_are_known(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "spoilt" / "MnM")
    spoil(tmp_path / "spoilt" / "MnM", "ES")
    for name, data in (("right", tiny_data), ("spoilt", tmp_path / "spoilt" / "MnM")):
        run(data, tmp_path / name / "run", scripts=SCRIPTS[:1])
    one, other = (weights(tmp_path / name / "run", "registration") for name in ("right", "spoilt"))
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_so_many_patients_keep_their_labels(tiny_data, tmp_path, capsys):
    def labelled(**words):
        settings = RegistrationSettings(
            data=tiny_data, cache=tmp_path, size=32, spacing=2.0, workers=1, **words
        )
        cases = open_cache(settings).cases
        return {case.code for case in cases if case.labelled and case.split == "Training"}

    chosen = {next(iter(labelled(labelled_cases=1, seed=seed))) for seed in range(8)}
    assert chosen == {"A0A0A0", "B0B0B0"}, "chosen by seed, one at a time"
    assert labelled(labelled_cases=2) == labelled() == {"A0A0A0", "B0B0B0"}

    capsys.readouterr()
    (kept,) = labelled(labelled_cases=1)
    assert f"labels used: those of ED and ES; in Training, only those of {kept}\n" in capsys.readouterr().out
    shutil.copytree(tiny_data, tmp_path / "spoilt" / "MnM")
    for phase in ("ED", "ES"):
        spoil(tmp_path / "spoilt" / "MnM", phase, keep=(kept, "D1A1A1", "D2C2C2"))
    for name, data in (("right", tiny_data), ("spoilt", tmp_path / "spoilt" / "MnM")):
        run(data, tmp_path / name / "run", "--labelled-cases", "1", scripts=SCRIPTS)
    for place in ("registration", "segmentation/original", "segmentation/propagated"):
        one, other = (weights(tmp_path / name / "run", place) for name in ("right", "spoilt"))
        assert all(torch.equal(one[name], other[name]) for name in one), place
    scores = [read_csv(tmp_path / name / "run" / "evaluation" / "cases.csv") for name in ("right", "spoilt")]
    assert scores[0] == scores[1], "Testing keeps its labels"
    vendor, other = ("A", "B") if kept == "A0A0A0" else ("B", "A")
    caption = (tmp_path / "right" / "run" / "evaluation" / "table.md").read_text()
    assert f"Trained on expert labels of ED and ES, 1 patient, of vendor {vendor};" in caption
    assert f"| {other} * |" in caption

    capsys.readouterr()
    words = ["--data", str(tiny_data), "--out", str(tmp_path / "out"), "--labelled-cases", "3", *TINY.split()]
    assert train_registration.main(words) == 2
    assert "--labelled-cases 3: Training" in capsys.readouterr().err

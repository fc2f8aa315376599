"""The experiments: jobs that are not repeated, intervals, and the datasets and labels that they make."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from datasets import write_acdc

from cardiac.cases import load_case
from cardiac.files import read_csv, read_json
from cardiac.layouts import read_cases
from cardiac.phantom import write_phantom
from cardiac.propagation import Propagated

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))


def test_a_job_that_has_rows_is_not_done_again_and_one_that_failed_is(tmp_path):
    from common import results

    path, called = tmp_path / "rows.csv", []

    def run(seed, fail=True):
        called.append(seed)
        if seed == 1 and fail:
            raise KeyboardInterrupt
        return [{"dice": 0.5 + seed}, {"dice": 0.25}]

    jobs, columns, words = [{"seed": 0}, {"seed": 1}], ("seed", "dice"), Namespace(seeds=2, steps=500)
    with pytest.raises(KeyboardInterrupt):
        results(path, columns, jobs, run, words)
    rows = results(path, columns, jobs, lambda seed: run(seed, fail=False), words)
    assert called == [0, 1, 1]
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    assert [float(row["dice"]) for row in rows] == [0.5, 0.25, 1.5, 0.25]
    few = results(path, columns, jobs[:1], run, Namespace(seeds=1, steps=500))
    assert len(few) == 2, "rows of other jobs stay only in the file"
    assert results(path, columns, jobs, run, words) == rows
    assert results(path, columns, jobs, run, words, ["--device", "cpu", "--workers=2"]) == rows
    with pytest.raises(SystemExit, match="made with steps 500, not 1000"):
        results(path, columns, jobs, run, Namespace(seeds=2, steps=1000))
    with pytest.raises(SystemExit, match="made with others , not --lr 1"):
        results(path, columns, jobs, run, words, ["--lr", "1"])


def test_an_interval_leaves_out_what_a_repetition_lacks():
    from common import interval

    differences = np.random.default_rng(0).normal(1, 0.5, (3, 40))
    mean, low, high = interval(differences, resamples=400)
    assert mean == pytest.approx(differences.mean())
    assert mean - 0.5 < low < mean < high < mean + 0.5
    differences[1, 7] = np.nan
    expected = np.nanmean(differences), low, high
    assert interval(differences, resamples=400) == pytest.approx(expected, abs=0.05)


def test_patients_without_a_score_of_one_model_are_not_taken_for_others():
    from common import by_seed, interval

    scores = {"one": {"A": 0.9, "B": 0.6}, "other": {"B": 0.6, "C": 0.2}, "none": {"D": 0.1}}
    rows = [{"seed": "0", "model": model, "case": case, "dice": str(dice)}
            for model, own in scores.items() for case, dice in own.items()]
    one, other = (by_seed(rows, lambda row, m=model: row["model"] == m) for model in ("one", "other"))
    np.testing.assert_array_equal(one, [[0.9, 0.6, np.nan, np.nan]])
    assert interval(one - other, resamples=100) == (0, 0, 0), "only B has both"


def test_every_patient_is_tested_once_over_the_folds(tiny_data, tmp_path):
    from scarce_labels import write_fold

    labelled = {case.code: case for case in read_cases(tiny_data).good() if case.labels}
    tested = []
    for fold in range(3):
        cases = read_cases(write_fold(tiny_data, tmp_path / str(fold), fold, 3)).good()
        assert {case.code for case in cases} == labelled.keys()
        for case in cases:
            assert (case.phases, case.vendor) == (labelled[case.code].phases, labelled[case.code].vendor)
            assert case.image.resolve() == labelled[case.code].image.resolve()
        tested += [case.code for case in cases if case.split == "Testing"]
    assert sorted(tested) == sorted(labelled)


def test_the_folder_of_acdc_holds_what_the_download_has(tmp_path, monkeypatch):
    import acdc_folder

    data = write_acdc(tmp_path / "download", training=2, testing=0, ed=1, es=3)
    (tmp_path / "split.csv").write_text(
        "patient,split,diagnosis\npatient001,Training,NOR\npatient002,Testing,NOR\n"
    )
    monkeypatch.setattr(acdc_folder, "PATIENTS", tmp_path / "split.csv")
    acdc_folder.main(["--data", str(data), "--out", str(tmp_path / "ACDC")])
    before, after = read_cases(data).good(), read_cases(tmp_path / "ACDC").good()
    assert [(case.code, case.split, case.ed, case.es) for case in after] == [
        ("ACDC001", "Training", 0, 1), ("ACDC002", "Testing", 0, 1)
    ]
    for one, other in zip(before, after):
        assert other.spacing == pytest.approx(one.spacing)
        (image, labels, _), (found, maps, _) = load_case(one), load_case(other)
        np.testing.assert_array_equal(found, image[..., [1, 3]])
        np.testing.assert_array_equal(np.stack([maps[0], maps[1]]), np.stack([labels[1], labels[3]]))
    with pytest.raises(SystemExit, match="no patient002"):
        acdc_folder.main(["--data", str(write_acdc(tmp_path / "less", training=1, testing=1))])


def test_what_the_oracle_and_full_trust_are_trained_on(tmp_path, capsys, no_pictures):
    import phantom_table

    few = {"training": 2, "validation": 1, "testing": 1, "unlabelled": 0}
    write_phantom(tmp_path / "phantom", **few, frames=6, slices=3, size=72)
    common = ["--data", tmp_path / "phantom", "--cache", tmp_path / "cache", "--recipe", "strong"]
    words = Namespace(size=32, spacing=4.0, channels=1, steps=2, registration_steps=2)
    cache, scores = phantom_table.register_and_propagate(tmp_path / "registered", common, words)
    assert {row["case"] for row in scores} == {case.code for case in cache.split("Training")}
    capsys.readouterr()
    for model in ("oracle", "original", "full trust"):
        rows = phantom_table.train_and_score(model, tmp_path, common, 1, words, cache, "strong")
        assert [row["model"] for row in rows] == 6 * [model]
    trusted, full = (Propagated.read(tmp_path / run / "propagation" / "labels.h5")
                     for run in ("registered", "seed1/full-trust"))
    assert trusted.trust.min() < 255
    assert full.trust is None
    np.testing.assert_array_equal(full.labels, trusted.labels)
    printed = capsys.readouterr().out
    assert "propagated: 12 expert slices + 24 propagated" in printed, "of 2 patients, 4 frames, 3 slices"
    assert "original: 12 expert slices + 0 propagated" in printed


def test_the_ingredients_of_the_segmentation_are_added_one_at_a_time(
    tiny_data, tmp_path, monkeypatch, capsys, no_pictures
):
    import segmentation_ingredients

    out = tmp_path / "ingredients"
    numbers = ["--size", "32", "--spacing", "2", "--channels", "2", "--steps", "2", "--steps-per-epoch", "2"]
    argv = ["experiment", "--data", str(tiny_data), "--out", str(out), *numbers]
    monkeypatch.setattr(sys, "argv", argv)
    segmentation_ingredients.main()
    rows = read_csv(out / "runs.csv")
    assert [row["name"] for row in rows] == list(segmentation_ingredients.RUNS)
    used = set()
    for folder in (out / "seed0").iterdir():
        (trained,) = folder.glob("segmentation/*/config.json")
        settings = read_json(trained)["settings"]
        mirrored = read_json(folder / "evaluation" / "config.json")["settings"]["mirrored"]
        used.add((*(settings[name] for name in ("crop", "augment", "averaging", "dice_weight")), mirrored))
    assert used == {
        ("centre", False, 0, 0, False),
        ("motion", False, 0, 0, False),
        ("motion", True, 0, 0, False),
        ("motion", True, 0.99, 0, False),
        ("motion", True, 0.99, 1, True),  # scored as it is before, and by four mirror images
    }
    shown = capsys.readouterr().out
    assert shown.count("segmentation/original: finished at step 2") == 1, "it is not trained again"
    table = shown.splitlines()[-8:]
    assert table[0].startswith("| segmentation | LV | MYO | RV |")
    for row, line in zip(rows, table[2:]):
        assert line.startswith(f"| {row['name']} | {float(row['LV']):.3f}")

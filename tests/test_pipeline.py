"""The four scripts in the order in which a user runs them, and Table 1 at the end."""

import csv
import json
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHORT, TINY
from datasets import MMS_CASES, write_acdc

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import phantom

COLUMNS = ["model", "LV", "MYO", "RV", "A", "B", "C", "D", "total"]
CASES = "model case vendor centre phase region dice hd95_mm assd_mm volume_ml reference_volume_ml paper_dice"
RUN = "best.pt last.pt log.csv config.json curves.png example.png"
WRITTEN = [
    *(f"registration/{name}" for name in [*RUN.split(), "quality.csv"]),
    *(f"propagation/{name}" for name in ("labels.h5", "quality.csv", "cine.gif")),
    *(f"segmentation/{model}/{name}" for model in ("original", "propagated") for name in RUN.split()),
    *(f"evaluation/{name}" for name in ("cases.csv", "table.csv", "table.md", "table_paper.csv")),
    *(f"evaluation/{name}" for name in ("summary.json", "report.html")),
]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scripts(data, out, *words):
    """Run all four scripts; returns their exit codes."""
    common = ["--data", str(data), "--out", str(out), "--workers", "1", *words]
    return [
        train_registration.main([*common, *TINY.split(), *SHORT.split()]),
        propagate_labels.main(common),
        train_segmentation.main([*common, *SHORT.split(), "--channels", "2"]),
        evaluate.main(common),
    ]


@pytest.fixture(scope="module")
def finished(trained_run, tmp_path_factory):
    """(data, out, words): a copy of the shared run, evaluated too."""
    data, trained = trained_run
    out = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(trained, out)
    words = ["--cache", str(trained.parent / "cache")]
    assert evaluate.main(["--data", str(data), "--out", str(out), "--workers", "1", *words]) == 0
    return data, out, words


def check_table(out, score, name):
    """Every cell is the plain mean of the scores it stands for."""
    table, rows = read(out / "evaluation" / name), read(out / "evaluation" / "cases.csv")
    assert list(table[0]) == COLUMNS
    assert [row["model"] for row in table] == ["original", "propagated"]
    for line in table:
        for column in COLUMNS[1:]:
            chosen = [
                float(row[score])
                for row in rows
                if row["model"] == line["model"] and column in (row["region"], row["vendor"], "total")
                and row[score]
            ]
            if chosen:
                assert float(line[column]) == pytest.approx(np.mean(chosen), abs=2e-6), column
            else:
                assert line[column] == "", column


def test_everything_is_where_the_design_says(finished):
    _, out, _ = finished
    for name in WRITTEN:
        assert (out / name).stat().st_size > 0, name


@pytest.mark.parametrize(("score", "name"), [("dice", "table.csv"), ("paper_dice", "table_paper.csv")])
def test_table_1_is_the_mean_of_the_rows_it_stands_for(finished, score, name):
    _, out, _ = finished
    check_table(out, score, name)
    line = read(out / "evaluation" / name)[0]
    assert line["B"] == line["C"] == "", "no case of these vendors in Testing"
    assert line["A"]
    assert line["D"]


def test_a_row_of_scores_a_model_case_phase_and_region(finished):
    _, out, _ = finished
    rows = read(out / "evaluation" / "cases.csv")
    assert list(rows[0]) == CASES.split()
    tested = [case for case in MMS_CASES if case.folder == "Testing"]
    assert len(rows) == 2 * len(tested) * 2 * 3
    assert {(row["case"], row["vendor"]) for row in rows} == {(case.code, case.vendor) for case in tested}
    assert {row["phase"] for row in rows} == {"ED", "ES"}
    assert all(row["dice"] == "" or 0 <= float(row["dice"]) <= 1 for row in rows)


def test_predictions_lie_on_the_images(finished):
    data, out, _ = finished
    for model in ("original", "propagated"):
        for case in (case for case in MMS_CASES if case.folder == "Testing"):
            found = nib.load(out / "evaluation" / "predictions" / model / f"{case.code}_sa_pred.nii.gz")
            source = nib.load(data / case.folder / case.code / f"{case.code}_sa.nii.gz")
            assert found.shape == source.shape
            assert found.get_data_dtype() == np.uint8
            np.testing.assert_array_equal(found.affine, source.affine)
            others = [t for t in range(source.shape[3]) if t not in (case.ed, case.es)]
            assert not np.asarray(found.dataobj)[..., others].any()


def test_both_models_get_the_same_steps_validations_and_learning_rates(finished):
    _, out, _ = finished
    logs = [read(out / "segmentation" / model / "log.csv") for model in ("original", "propagated")]
    for name in ("epoch", "step", "lr"):
        assert [row[name] for row in logs[0]] == [row[name] for row in logs[1]]
    assert [row["step"] for row in logs[0]] == ["2", "4"]
    for row in logs[0]:
        assert {"val_dice_LV", "val_dice_MYO", "val_dice_RV", "unseen_dice", "val_loss"} <= set(row)
    losses = [[row["loss"] for row in log] for log in logs]
    assert losses[0] != losses[1], "both were trained on the same labels"
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert summary


def test_quality_of_the_registration_has_a_row_a_case_and_region(finished):
    _, out, _ = finished
    rows = read(out / "registration" / "quality.csv")
    columns = "case,vendor,split,region,dice_before,dice_after,hd95_mm_before,hd95_mm_after,folding_percent"
    assert list(rows[0]) == [*columns.split(","), "sd_log_jacobian"]
    expected = {(c.code, c.folder, r) for c in MMS_CASES[3:] for r in ("LV", "MYO", "RV")}
    assert {(row["case"], row["split"], row["region"]) for row in rows} == expected
    assert all(0 < float(row["dice_before"]) < 1 for row in rows)


def test_finished_work_is_not_done_twice(finished, capsys):
    data, out, words = finished
    results = [path for path in out.rglob("*") if path.suffix in (".pt", ".h5", ".gz", ".csv")]
    before = {path: path.stat().st_mtime_ns for path in results}
    assert scripts(data, out, *words) == [0, 0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capsys.readouterr().out.count("finished") >= 5


def test_the_registration_is_scored_on_the_cases_as_they_are(finished, tmp_path):
    data, out, _ = finished
    data, out = shutil.copytree(data, tmp_path / data.name), shutil.copytree(out, tmp_path / "run")
    (table,) = data.glob("*opendataset.csv")
    before = read(out / "registration" / "quality.csv")
    rows, code = read(table), sorted(path.name for path in (data / "Testing").iterdir())[0]

    def scores(rows):
        """The rows of quality.csv if the table of the dataset has these rows."""
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        assert train_registration.main(["--data", str(data), "--out", str(out), "--workers", "1"]) == 0
        return read(out / "registration" / "quality.csv")

    other = {"Vendor": "C", "VendorName": "GE"}
    corrected = [row | other if row["External code"] == code else row for row in rows]
    assert {row["vendor"] for row in before if row["case"] == code} != {"C"}
    assert scores(corrected) == [row | {"vendor": "C"} if row["case"] == code else row for row in before]
    away = shutil.move(data / "Testing" / code, tmp_path)
    others = scores([row for row in rows if row["External code"] != code])
    assert others == [row for row in before if row["case"] != code] != before
    shutil.move(away, data / "Testing")
    assert scores(rows) == before, "also on cases added since"


def test_train_more_and_the_table_follows(finished, tmp_path):
    data, finished_out, words = finished
    out = tmp_path / "run"
    shutil.copytree(finished_out, out)
    common = ["--data", str(data), "--out", str(out), "--workers", "1", *words]
    assert train_segmentation.main([*common, "--max-steps", "6"]) == 0
    for model in ("original", "propagated"):
        assert [row["step"] for row in read(out / "segmentation" / model / "log.csv")] == ["2", "4", "6"]
    summary = (out / "evaluation" / "summary.json").read_text()
    assert evaluate.main(common) == 0
    assert (out / "evaluation" / "summary.json").read_text() != summary
    check_table(out, "dice", "table.csv")
    unequal, table = "TRAINED FOR DIFFERENT NUMBERS OF STEPS", out / "evaluation" / "table.md"
    assert unequal not in table.read_text()
    assert train_segmentation.main([*common, "--max-steps", "7", "--labels", "original"]) == 0
    assert evaluate.main(common) == 0
    assert unequal in table.read_text()


@pytest.mark.parametrize("labels", ["original", "propagated"])
def test_one_model_alone_is_one_row(finished, tmp_path, labels):
    data, finished_out, words = finished
    out = tmp_path / "run"
    shutil.copytree(finished_out, out, ignore=shutil.ignore_patterns("evaluation"))
    other = {"original": "propagated", "propagated": "original"}[labels]
    shutil.rmtree(out / "segmentation" / other)
    assert evaluate.main(["--data", str(data), "--out", str(out), "--workers", "1", *words]) == 0
    assert [row["model"] for row in read(out / "evaluation" / "table.csv")] == [labels]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_script_goes_on_with_the_same_words(trained_run, tmp_path, monkeypatch, number, code):
    data, expected = trained_run
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--cache", str(expected.parent / "cache")]
    words += ["--workers", "1", *TINY.split(), *SHORT.split()]
    draw = train_registration.Registration.draw

    def signalled(self, step):
        if step == 2:
            signal.raise_signal(number)
        return draw(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_registration.Registration, "draw", signalled)
        assert train_registration.main(words) == code
    folder = tmp_path / "run" / "registration"
    assert not (folder / "quality.csv").exists()
    assert train_registration.main(words) == 0
    for name in ("last.pt", "best.pt"):
        folders = folder, expected / "registration"
        one, other = (torch.load(each / name, weights_only=True) for each in folders)
        assert one["progress"]["step"] == other["progress"]["step"]
        for key, value in one["network"].items():
            assert torch.equal(value, other["network"][key]), key
    assert (folder / "quality.csv").read_bytes() == (expected / "registration" / "quality.csv").read_bytes()


@pytest.mark.parametrize("kind", ["phantom", "acdc"])
def test_other_data_from_start_to_table(tmp_path, kind):
    if kind == "phantom":
        counts = {"training": 2, "validation": 1, "testing": 2, "unlabelled": 1}
        phantom.write_phantom(tmp_path / "data", **counts, frames=6, slices=2, size=40, seed=1)
    else:
        write_acdc(tmp_path / "data", training=2, testing=1)
    assert scripts(tmp_path / "data", tmp_path / "run") == [0, 0, 0, 0]
    for name in WRITTEN:
        assert (tmp_path / "run" / name).exists(), name
    check_table(tmp_path / "run", "dice", "table.csv")


def test_nothing_is_written_into_the_data(finished):
    data, _, _ = finished
    names = {path.name for path in data.rglob("*") if path.is_file()}
    assert len(names) == 1 + 2 * len(MMS_CASES)

"""Scores, tables and predictions, by hand and through `evaluate.main`."""

import json
import shutil
from copy import deepcopy
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from datasets import MMS_CASES, TABLE, Tiny, heart, write_mms, write_nifti

import evaluate
from cardiac import REGIONS, evaluation, metrics, page, predict, report
from cardiac.cache import open_cache
from cardiac.cases import VENDORS
from cardiac.files import InputError, read_csv, read_json, write_csv
from cardiac.metrics import largest_component
from cardiac.nifti import write_labels
from cardiac.predict import find_scans
from cardiac.preprocessing import most_likely, one_hot
from cardiac.propagation import Propagated
from cardiac.settings import EvaluationSettings

TESTING = [case for case in MMS_CASES if case.folder == "Testing"]


def row(
    model="original", case="A1", phase="ED", region="LV", vendor="A", dice=0.5, volume=10.0, reference=10.0
):
    scores = {"dice": dice, "hd95_mm": 1.0, "assd_mm": 1.0, "volume_ml": volume}
    start = {"model": model, "case": case, "vendor": vendor, "centre": "", "phase": phase, "region": region}
    return {**start, **scores, "reference_volume_ml": reference, "paper_dice": dice}


# ------------------------------------------------------------------------------------------ by hand


def results(dice, models=evaluation.MODELS, unlabelled=""):
    """`Results` of cases {code: Dice}, the same for all models; of training vendors only A has labels."""
    vendors = "A" + unlabelled
    training = [SimpleNamespace(code=f"T{each}", vendor=each, labelled=each == "A") for each in vendors]
    cache = SimpleNamespace(name="DATA", skipped=(), split=lambda name: training)
    cache.training_and_validation = lambda *chosen, finished: (training, [], [])
    rows = [row(model, code, phase, region, dice=score) for model in models for code, score in dice.items()
            for phase in ("ED", "ES") for region in REGIONS]
    used = {"seed": 0, "held_out": [], "labelled_phases": "both"}
    trained = {model: {"steps": 10, "best": 0.5, "settings": used} for model in models}
    cases = [SimpleNamespace(code=code, vendor="A") for code in dice]
    return evaluation.Results(rows, None, cache, cases, "Testing", trained, own=True)


def test_cases_are_ranked_by_their_dice_and_then_by_code():
    scores = {"P1": 0.7, "P2": 0.9, "P3": 0.8, "P4": np.nan, "P5": 0.6}
    assert results(scores).ranked("original") == {"best": "P2", "median": "P1", "worst": "P4"}
    ties = results({"P3": 0.5, "P1": 0.5, "P2": 0.5}).ranked("propagated")
    assert ties == {"best": "P1", "median": "P2", "worst": "P3"}


def test_the_caption_names_unlabelled_vendors_where_the_registration_matters():
    saw = "The registration saw unlabelled scans of vendor C"
    assert f"{saw}, D." in results({"P1": 0.5}, unlabelled="DC").caption()
    assert saw not in results({"P1": 0.5}, models=("original",), unlabelled="C").caption()
    assert saw not in results({"P1": 0.5}).caption()


def test_table_row_is_the_plain_mean_and_leaves_nan_out():
    rows = [row(dice=0.8), row(dice=0.4, region="RV", vendor="C"), row(dice=float("nan"), region="RV")]
    table = evaluation.table_row("original", rows)
    assert (table["LV"], table["RV"], table["A"], table["C"]) == (0.8, 0.4, 0.8, 0.4)
    assert table["total"] == pytest.approx(0.6)
    assert np.isnan(table["MYO"])
    assert np.isnan(table["D"])


def test_heart_function_by_hand():
    volumes = {
        ("ED", "LV"): 120.0,
        ("ES", "LV"): 48.0,
        ("ED", "RV"): 100.0,
        ("ES", "RV"): 50.0,
        ("ED", "MYO"): 80.0,
    }
    found = evaluation.heart_function(volumes)
    assert found["LV_SV_ml"] == 72
    assert found["LV_EF_percent"] == pytest.approx(60)
    assert found["RV_EF_percent"] == pytest.approx(50)
    assert found["LV_mass_g"] == pytest.approx(84)


def test_heart_function_without_a_ventricle_has_no_ejection_fraction():
    found = evaluation.heart_function(dict.fromkeys([(p, r) for p in ("ED", "ES") for r in REGIONS], 0.0))
    assert np.isnan(found["LV_EF_percent"])


def test_comparison_is_propagated_minus_original_by_patient():
    rows = [row(model, case, phase, vendor=vendor, dice=dice + gain)
            for model, gain in (("original", 0.0), ("propagated", 0.1))
            for case, vendor, dice in (("A1", "A", 0.5), ("B1", "B", 0.7), ("B2", "B", 0.3))
            for phase in ("ED", "ES")]
    found = {each["group"]: each for each in evaluation.comparison(rows)}
    assert set(found) == {"all", "A", "B", "LV"}
    assert found["all"]["mean_difference"] == pytest.approx(0.1)
    assert (found["all"]["n"], found["A"]["n"], found["B"]["n"]) == (3, 1, 2)  # patients, not phases


def test_failures_are_regions_in_one_mask_alone():
    lost = {**row(dice=0.0), "hd95_mm": float("nan")}
    absent = {**row(dice=float("nan"), region="RV"), "hd95_mm": float("nan")}
    missing, undefined = evaluation.failures([row(), lost, absent, row(dice=0.0)])  # the last: no overlap
    assert missing == [lost]
    assert undefined == 1


def test_scores_survive_the_csv(tmp_path):
    rows = [row(dice=0.123456), row(dice=float("nan"))]
    write_csv(tmp_path / "cases.csv", evaluation.CASES, rows)
    again = evaluation.read_scores(tmp_path / "cases.csv")
    assert again[0] == rows[0]
    assert np.isnan(again[1]["dice"])


def test_p_text():
    assert evaluation.p_text(0.0004) == "p < 0.001"
    assert evaluation.p_text(0.0301) == "p = 0.030"
    assert evaluation.p_text(float("nan")) == "p = not defined"


@pytest.mark.parametrize("name", ["ACDC", "my data/..", "", "predictions", "../x", "a<b>"])
def test_safe_name_is_one_new_folder(name):
    safe = evaluate.safe_name(name)
    assert safe not in ("", ".", "..", "predictions")
    assert not set(safe) & set("/\\<>& .")


OBLIQUE = np.array(
    [[1.2, 0.3, -0.4, -90.5], [-0.25, 1.15, 2.1, -60.25], [0.1, -0.2, 8.7, 12.125], [0, 0, 0, 1]]
)


@pytest.mark.parametrize("shape", [(31, 45, 3), (37, 29, 5, 7), (16, 33, 1, 2)])
@pytest.mark.parametrize("units", [("mm", "sec"), ("meter", "msec"), ("unknown", "unknown")])
@pytest.mark.parametrize("form", ["sform", "qform", "none"])
def test_labels_overlay_their_image(tmp_path, shape, units, form):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=shape).astype(np.float32), None)
    image.header.set_zooms((1.25, 1.3, 8.5, 0.0317)[: len(shape)])
    image.header.set_xyzt_units(*units)
    image.header.set_slope_inter(2.5, 7)
    image.header["cal_max"] = 900
    if form == "sform":
        image.set_sform(OBLIQUE, 1)
    elif form == "qform":
        image.set_qform(np.diag([-1.25, -1.3, 8.5, 1]) + np.array([[0] * 3 + [5]] * 3 + [[0] * 4]), 1)
    nib.save(image, tmp_path / "image.nii.gz")
    image = nib.load(tmp_path / "image.nii.gz")
    labels = np.random.default_rng(1).integers(0, 4, shape).astype(np.uint8)
    write_labels(tmp_path / "labels.nii.gz", labels, tmp_path / "image.nii.gz")
    found = nib.load(tmp_path / "labels.nii.gz")
    assert found.shape == shape
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(found.dataobj), labels)
    np.testing.assert_array_equal(found.affine, image.affine)
    for field in ("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "dim"):
        np.testing.assert_array_equal(found.header[field], image.header[field], field)
    assert found.header.get_xyzt_units() == image.header.get_xyzt_units()
    assert found.header["cal_max"] == 0


# ------------------------------------------------------------------------------------- evaluate.main


class Run:
    """A trained run in `out`; calling it evaluates `data`."""

    def __init__(self, data, out):
        self.data, self.out, self.folder = data, out, out / "evaluation"

    def __call__(self, *words, data="own"):
        data = self.data if data == "own" else data
        source = () if data is None else ("--data", data)
        return evaluate.main([str(word) for word in ("--out", self.out, "--workers", 1, *source, *words)])


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    """A run that was evaluated once: to read, not to change."""
    data, trained = trained_run
    run = Run(data, tmp_path_factory.mktemp("evaluated") / "run")
    shutil.copytree(trained, run.out)
    for path in run.out.glob("segmentation/*/best.pt"):  # after four steps it would predict only background
        state = torch.load(path, weights_only=True)
        state["network"]["classify.bias"].zero_()
        torch.save(state, path)
    assert run("--largest-component") == 0
    return run


@pytest.fixture
def run(evaluated, tmp_path):
    """A copy of the evaluated run."""
    shutil.copytree(evaluated.out, tmp_path / "run")
    shutil.copytree(evaluated.out.parent / "cache", tmp_path / "cache")
    return Run(evaluated.data, tmp_path / "run")


def outcome(folder):
    """Bytes of what an evaluation wrote, without config.json (which has the number of workers)."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "config.json"}


def test_evaluation_writes_what_the_design_says(evaluated):
    rows = evaluation.read_scores(evaluated.folder / "cases.csv")
    assert len(rows) == 2 * len(TESTING) * 2 * 3
    table = read_csv(evaluated.folder / "table.csv")
    assert list(table[0]) == ["model", "LV", "MYO", "RV", *VENDORS, "total"]
    for line in table:
        own = [r for r in rows if r["model"] == line["model"] and not np.isnan(r["dice"])]
        for name in evaluation.TABLE[1:]:
            chosen = [r["dice"] for r in own if name in (r["region"], r["vendor"], "total")]
            assert line[name] == (f"{np.mean(chosen):.6f}" if chosen else ""), name
    text = (evaluated.folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert {each["group"] for each in summary["comparison"]} == {"all", "A", "D", *REGIONS}
    assert summary["made_from"]["models"]["original"]["steps"] == 4
    assert summary["undefined"] == sum(np.isnan(row["dice"]) for row in rows)
    tables = "table.md table_paper.csv table_largest.csv clinical.csv agreement.csv comparison.csv"
    for name in (*tables.split(), "dice.png", "bland_altman.png", "overlays_original.png", "report.html"):
        assert (evaluated.folder / name).stat().st_size > 40, name
    assert not list(evaluated.out.rglob(".tmp-*"))


def test_predictions_are_what_was_scored(evaluated):
    rows = evaluation.read_scores(evaluated.folder / "cases.csv")
    for case in TESTING:
        image = nib.load(evaluated.data / "Testing" / case.code / f"{case.code}_sa.nii.gz")
        name = f"predictions/propagated/{case.code}_sa_pred.nii.gz"
        found = nib.load(evaluated.folder / name)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found.affine, image.affine)
        assert found.header.get_zooms() == image.header.get_zooms()
        labels = np.asarray(found.dataobj)
        assert not np.delete(labels, (case.ed, case.es), -1).any()
        wanted = {"model": "propagated", "case": case.code, "phase": "ES", "region": "RV"}.items()
        (own,) = [each for each in rows if wanted <= each.items()]
        voxel = np.prod(image.header.get_zooms()[:3]) / 1000
        assert own["volume_ml"] == pytest.approx(voxel * (labels[..., case.es] == 3).sum(), abs=1e-5)


def test_workers_do_not_matter(evaluated, run):
    assert run("--largest-component", "--workers", 2, "--overwrite") == 0
    assert outcome(run.folder) == outcome(evaluated.folder)


def test_finished_work_is_not_done_twice(evaluated, run, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert run("--largest-component") == 0
    assert "finished" in capsys.readouterr().out
    assert run("--largest-component", "--view", "E1A1A1") == 0  # another report, the same scores
    assert json.loads((run.folder / "summary.json").read_text())["shown"]["view"] == ["E1A1A1"]
    changed = {
        path.name for path, stamp in stamps.items() if path.is_file() and path.stat().st_mtime_ns != stamp
    }
    assert "report.html" in changed
    assert not any(name == "cases.csv" or name.endswith(".nii.gz") for name in changed)
    tables = ("cases.csv", "table.csv", "table_largest.csv", "agreement.csv", "comparison.csv")
    assert all((run.folder / name).read_bytes() == (evaluated.folder / name).read_bytes() for name in tables)


@pytest.mark.parametrize("change", ["report", "labels", "training", "vendor"])
def test_what_is_shown_is_of_today(evaluated, run, change):
    """The scores are kept, but the report also shows the training cases and their labels."""
    scores, page = (run.folder / name for name in ("cases.csv", "report.html"))
    stamp, before = scores.stat().st_mtime_ns, page.read_text()
    if change == "report":
        page.unlink()
    elif change == "labels":
        (run.out / "propagation" / "labels.h5").unlink()
    elif change == "training":
        (run.out / "registration" / "curves.png").unlink()
    else:
        run.data = shutil.copytree(run.data, run.out.parent / "data" / run.data.name)
        table = run.data / TABLE
        table.write_text(table.read_text().replace("B0B0B0,Philips,B", "B0B0B0,,A"))
    assert run("--largest-component") == 0
    assert scores.stat().st_mtime_ns == stamp
    assert (page.read_text() == before) == (change == "report")


def test_the_report_shows_the_labels_that_were_trained_on_alone(run, tmp_path):
    """Labels propagated since, for other patients or differently, do not belong to the scores."""
    report, path = run.folder / "report.html", run.out / "propagation" / "labels.h5"
    assert 'id="propagation-data"' in report.read_text()
    propagated = Propagated.read(path)
    changed, other_patients = deepcopy(propagated), deepcopy(propagated)
    changed.labels[0] = 0
    other_patients.where = [("Z9Z9Z9", *place) for _, *place in propagated.where]
    for labels in (changed, other_patients):
        labels.write(path, "something else")
        for models in (("original", "propagated"), ("original",)):
            for model in {"original", "propagated"} - set(models):
                shutil.move(run.out / "segmentation" / model, tmp_path / model)
            assert run("--overwrite") == 0
            shown = labels is changed and models == ("original",)
            assert ('id="propagation-data"' in report.read_text()) == shown
            assert (page.NOT_SHOWN in report.read_text()) != shown
        shutil.move(tmp_path / "propagated", run.out / "segmentation" / "propagated")


def test_no_point_of_a_bland_altman_plot_is_out_of_view(monkeypatch):
    """The plots of a quantity share their axes, whichever model errs more."""
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    reference = np.linspace(40, 70, 8)
    wrong = {"original": 0.3, "propagated": -46.0}
    measured = {model: (reference + error * (np.arange(8) % 2), reference) for model, error in wrong.items()}
    quantities = ("LV_EDV_ml", "LV_ESV_ml", "LV_EF_percent")
    agreement = [{"model": model, "quantity": name, **metrics.agreement(*pair)}
                 for model, pair in measured.items() for name in quantities]
    results = SimpleNamespace(
        models=list(wrong), agreement=agreement, measured=lambda model, quantity: measured[model]
    )
    report.draw_bland_altman("unused.png", results)
    (figure,) = drawn
    assert len(figure.axes) == 6
    for axes in figure.axes:
        low, high = axes.get_ylim()
        for line in axes.lines:
            assert low <= np.min(line.get_ydata()) <= np.max(line.get_ydata()) <= high


def test_a_model_that_is_missing_is_a_missing_row(run, capsys):
    shutil.rmtree(run.out / "segmentation" / "propagated")
    assert run() == 0
    printed = capsys.readouterr().out
    assert [line["model"] for line in read_csv(run.folder / "table.csv")] == ["original"]
    assert read_csv(run.folder / "comparison.csv") == []
    gone = ("overlays_propagated.png", "predictions/propagated", "cases_largest.csv", "table_largest.csv")
    assert not any((run.folder / name).exists() for name in gone), "of the previous evaluation"
    assert "Gain of the propagated" not in (run.folder / "report.html").read_text()
    assert "original  " in printed
    assert "total  steps" in printed


def test_a_split_that_is_absent_is_named(run, tmp_path, capsys):
    other = write_mms(tmp_path / "other", [Tiny("Q1"), Tiny("Q2", "Validation")])
    assert run(data=other) == 0
    assert "--split can be Training or Validation" in capsys.readouterr().out
    assert not (run.folder / "other").exists()
    assert run(data=write_mms(tmp_path / "bare", [Tiny("Q3", "Training/Unlabeled")])) == 0
    assert "nor in any other split" in capsys.readouterr().out


def test_a_case_that_is_new_or_another_is_scored(run, tmp_path, capsys):
    data = shutil.copytree(run.data, tmp_path / "data" / run.data.name)
    assert run("--cache", tmp_path / "cache", data=data) == 0
    case = TESTING[0]
    label = data / "Testing" / case.code / f"{case.code}_sa_gt.nii.gz"
    image = nib.load(label)
    voxels = np.asarray(image.dataobj).copy()
    voxels[:, :, 0] = 0
    nib.save(nib.Nifti1Image(voxels, None, image.header), label)
    before = read_csv(run.folder / "cases.csv")
    assert run("--cache", tmp_path / "cache", data=data) == 0
    after = read_csv(run.folder / "cases.csv")
    assert {one["case"] for one, other in zip(before, after) if one != other} == {case.code}
    predictions = run.folder / "predictions" / "original"
    assert {path.name for path in predictions.iterdir()} == {f"{c.code}_sa_pred.nii.gz" for c in TESTING}
    assert run("--cache", tmp_path / "cache", "--split", "Validation", data=data) == 0
    assert {path.name[:6] for path in predictions.iterdir()} == {"D1A1A1", "D2C2C2"}


@pytest.mark.parametrize(
    ("words", "said"), [(["--view", "nobody"], "nobody"), (["--predict", "x.nii.gz"], "either")]
)
def test_wrong_words_are_one_line(evaluated, capsys, words, said):
    before = outcome(evaluated.out)
    assert evaluated(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert outcome(evaluated.out) == before


def test_another_dataset_has_its_own_folder(evaluated, run, tmp_path, capsys):
    other = write_mms(
        tmp_path / "</script><b>&data", [Tiny("Q1", "Testing", "C"), Tiny("Q2", "Testing", "C", 1, 3)]
    )
    assert run(data=other) == 0
    assert "trained on another dataset" in capsys.readouterr().out
    (folder,) = [path for path in run.folder.iterdir() if path.is_dir() and path.name != "predictions"]
    assert folder.name == "script_b_data"
    assert {line["case"] for line in read_csv(folder / "cases.csv")} == {"Q1", "Q2"}
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;&amp;data" in page
    assert "<b>&data" not in page
    shutil.rmtree(folder)
    assert outcome(run.folder) == outcome(evaluated.folder)


# ------------------------------------------------------------------------------------------ --predict


def test_predict_is_the_evaluation_without_labels(run):
    assert run("--predict", run.data / "Testing", data=None) == 0
    for case in TESTING:
        folder = run.out / "predictions" / f"{case.code}_sa"
        found = nib.load(folder / f"{case.code}_sa_pred.nii.gz")
        scored = nib.load(run.folder / "predictions" / "propagated" / f"{case.code}_sa_pred.nii.gz")
        for frame in (case.ed, case.es):
            np.testing.assert_array_equal(found.dataobj[..., frame], scored.dataobj[..., frame])
        assert found.header == scored.header
        assert np.asarray(found.dataobj).any(axis=(0, 1, 2)).all()  # every frame
        rows = read_csv(folder / "volumes.csv")
        assert [float(line["time_ms"]) for line in rows] == pytest.approx([0, 40, 80, 120, 160])
        voxel = np.prod(found.header.get_zooms()[:3]) / 1000
        volumes = voxel * (np.asarray(found.dataobj) == 3).sum((0, 1, 2))
        assert [float(line["RV_ml"]) for line in rows] == pytest.approx(list(volumes), abs=1e-5)
        assert (folder / "volumes.png").stat().st_size > 5000
    rows = read_csv(run.out / "predictions" / "summary.csv")
    how = [tuple(row[name] for name in ("model", "steps", "largest_component")) for row in rows]
    assert how == len(TESTING) * [("propagated", "4", "False")]


class Bands(torch.nn.Module):
    """Labels pixels by their intensity, so that different slices get different labels."""

    def forward(self, x):
        return -40 * (x - torch.tensor([0.1, 0.35, 0.6, 0.85]).view(1, 4, 1, 1)).abs()


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_every_slice_of_every_frame_comes_back_to_its_place(at_once, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SLICES_AT_ONCE", at_once)
    settings = EvaluationSettings(data=evaluated.data, cache=tmp_path, size=32, spacing=2.0, workers=1)
    cache = open_cache(settings)
    case = cache.split("Testing")[0]
    store = evaluation.SliceStore(cache, [case], torch.device("cpu"))
    frames = [4, 0, 3, 1, 2]
    expected = np.zeros(case.shape, np.uint8)
    for frame, z in np.ndindex(case.frames, case.slices):
        slices = Bands()(store.frame(store.cases[0], frame)[z : z + 1]).softmax(1)[:, 1:]
        regions = case.grid(cache).from_slices(slices.transpose(0, 1).numpy())[:, 0]
        expected[:, :, z, frame] = most_likely(regions)
    planes = expected.reshape(-1, case.slices * case.frames).T
    assert len(np.unique(planes, axis=0)) == len(planes), "no two slices are alike"

    labels, softmax = evaluation.predict(Bands(), store, frames)
    np.testing.assert_array_equal(labels, expected)
    assert set(softmax) == {case.ed, case.es}
    for frame, shares in softmax.items():
        np.testing.assert_array_equal(most_likely(shares[1:]), expected[..., frame])
    labels, _ = evaluation.predict(Bands(), store, (case.ed, case.es))
    assert not labels[..., [t for t in range(case.frames) if t not in (case.ed, case.es)]].any()
    predict.predict_scan(tmp_path / "out", case.image, Bands(), settings, torch.device("cpu"))
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "out_pred.nii.gz").dataobj, expected)


WHOLE = {"frames": 6, "frames_without_LV": 0, "ED": 4, "ES": 1, "LV_EDV_ml": 90.04, "LV_ESV_ml": 40.0,
         "LV_SV_ml": 50.04, "LV_EF_percent": 55.58, "LV_mass_g": 100.0}
EDV, MASS = "A: ED 4, EDV 90.0 ml", ", mass 100.0 g"
ESV = ", ES 1, ESV 40.0 ml, SV 50.0 ml, EF 55.6 %"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({}, EDV + MASS + ESV),
        ({"LV_mass_g": None}, EDV + ESV),
        ({"ES": None, "LV_EF_percent": None}, EDV + MASS),
        ({"frames_without_LV": 2}, EDV + MASS + ESV + "; no LV in 2 of 6 frames"),
        ({"ED": None, "frames_without_LV": 6}, "A; no LV in 6 of 6 frames"),
    ],
)
def test_the_line_of_a_scan_says_what_was_found_and_what_not(found, line):
    assert predict._result_line("A", WHOLE | found) == line


def test_ed_and_es_are_the_largest_and_the_smallest_lv(evaluated, tmp_path, monkeypatch):
    """A network that knows the truth finds the phases, the volumes and the ejection fraction."""
    image, labels = heart((40, 36, 3, 6), 4, 1)
    write_nifti(tmp_path / "scan.nii.gz", image)
    regions = [one_hot(labels[..., frame]) for frame in range(6)]
    monkeypatch.setattr(predict, "regions_on_own_grid", lambda *_: iter(regions))
    settings = EvaluationSettings(predict=(tmp_path,), size=32, spacing=2.0)
    found = predict.predict_scan(
        tmp_path / "out", tmp_path / "scan.nii.gz", None, settings, torch.device("cpu")
    )
    voxel = 1.4 * 1.3 * 9 / 1000
    cavity = voxel * (labels == 1).sum((0, 1, 2))
    assert (found["ED"], found["ES"]) == (4, 1)
    assert found["LV_EDV_ml"] == pytest.approx(cavity[4], rel=1e-5)
    assert found["LV_EF_percent"] == pytest.approx(100 * (cavity[4] - cavity[1]) / cavity[4], rel=1e-5)
    assert found["LV_mass_g"] == pytest.approx(1.05 * voxel * (labels[..., 4] == 2).sum(), rel=1e-5)
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "out_pred.nii.gz").dataobj, labels)

    regions[3] = np.zeros_like(regions[3])  # a frame in which the network fails is not ES
    monkeypatch.setattr(predict, "regions_on_own_grid", lambda *_: iter(regions))
    again = predict.predict_scan(
        tmp_path / "out", tmp_path / "scan.nii.gz", None, settings, torch.device("cpu")
    )
    assert again == {**found, "frames_without_LV": 1}

    regions = [regions[4] if t == 4 else np.zeros_like(regions[4]) for t in range(6)]
    monkeypatch.setattr(predict, "regions_on_own_grid", lambda *_: iter(regions))
    again = predict.predict_scan(
        tmp_path / "out", tmp_path / "scan.nii.gz", None, settings, torch.device("cpu")
    )
    assert again["ES"] is again["LV_EF_percent"] is None, "LV in only one frame says nothing about ES"

    regions = [one_hot(labels[..., t] * (labels[..., t] != (3 if t == 1 else 0))) for t in range(6)]
    monkeypatch.setattr(predict, "regions_on_own_grid", lambda *_: iter(regions))
    again = predict.predict_scan(
        tmp_path / "a$_$b", tmp_path / "scan.nii.gz", None, settings, torch.device("cpu")
    )
    without = dict.fromkeys(("RV_ESV_ml", "RV_SV_ml", "RV_EF_percent"))
    assert again == {**found, **without}, "an RV that was not found at ES"


def stopped_at_the_second_scan(monkeypatch, error):
    """Let the second scan that is begun raise `error`; returns the list of those begun."""
    begun, predict_scan = [], predict.predict_scan

    def stopped(folder, *arguments):
        begun.append(folder.name)
        if len(begun) == 2:
            raise error
        return predict_scan(folder, *arguments)

    monkeypatch.setattr(predict, "predict_scan", stopped)
    return begun


def test_predict_goes_on_with_the_scan_at_which_it_was_killed(run, monkeypatch):
    begun = stopped_at_the_second_scan(monkeypatch, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        run("--predict", run.data / "Testing", data=None)
    assert run("--predict", run.data / "Testing", data=None) == 0
    assert begun == ["E1A1A1_sa", "E2D2D2_sa", "E2D2D2_sa"]
    text = (run.out / "predictions" / "summary.csv").read_text()
    assert len(text.splitlines()) == 1 + len(TESTING)
    assert str(run.data) not in text


def test_predict_anew_goes_on_without_overwrite(run, monkeypatch, capsys):
    words = ("--predict", run.data / "Testing")
    assert run(*words, data=None) == 0
    summary = run.out / "predictions" / "E2D2D2_sa" / "summary.json"
    before = json.loads(summary.read_text())
    begun = stopped_at_the_second_scan(monkeypatch, KeyboardInterrupt)
    assert run(*words, "--overwrite", data=None) == 130
    assert "without --overwrite" in capsys.readouterr().err
    left = json.loads(summary.read_text())
    assert left["made_from"].pop("modified") is None
    before["made_from"].pop("modified")
    assert left == before, "old results are kept until they are replaced"
    assert run(*words, data=None) == 0
    assert begun == ["E1A1A1_sa", "E2D2D2_sa", "E2D2D2_sa"]
    summary.write_text("{")
    assert run(*words, "--overwrite", data=None) == 0, "a damaged one, too"


def test_predict_does_not_take_labels_for_an_image(run, tmp_path, capsys):
    write_nifti(tmp_path / "A_sa_gt.nii.gz", heart((45, 37, 3, 2), 0, 1)[1])
    assert run("--predict", tmp_path / "A_sa_gt.nii.gz", data=None) == 2
    assert "A_sa_gt.nii.gz: no voxel is larger than 3: labels, not an image" in capsys.readouterr().err


def test_predict_three_dimensions_and_twice(run, tmp_path, capsys):
    image, _ = heart((45, 37, 3, 2), 0, 1)
    write_nifti(tmp_path / "in" / "still.nii.gz", image[..., 0])
    words = ("--predict", tmp_path / "in" / "still.nii.gz")
    assert run(*words, data=None) == 0
    folder = run.out / "predictions" / "still"
    assert nib.load(folder / "still_pred.nii.gz").shape == (45, 37, 3)
    assert json.loads((folder / "summary.json").read_text())["ES"] is None
    first = outcome(folder)
    capsys.readouterr()
    assert run(*words, data=None) == 0
    assert "finished" in capsys.readouterr().out
    assert run(*words, "--largest-component", data=None) == 0  # other options: redone
    labels = np.asarray(nib.load(folder / "still_pred.nii.gz").dataobj)
    np.testing.assert_array_equal(labels, largest_component(labels))
    assert run(*words, data=None) == 0
    assert outcome(folder) == first
    write_nifti(tmp_path / "elsewhere" / "still.nii.gz", image[..., 1])
    assert run("--predict", tmp_path / "elsewhere", data=None) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert outcome(folder) == first


def test_scans_are_named_apart(tmp_path):
    for patient in ("p1", "p2"):
        write_nifti(tmp_path / patient / "sa.nii.gz", np.ones((4, 4, 2), np.int16))
        write_nifti(tmp_path / patient / "sa_gt.nii.gz", np.ones((4, 4, 2), np.int16))
    write_nifti(tmp_path / "p1" / "other.nii", np.ones((4, 4, 2), np.int16))
    assert list(find_scans([tmp_path])) == ["other", "p1_sa", "p2_sa"]
    assert list(find_scans([tmp_path / "p1" / "sa_gt.nii.gz"])) == ["sa_gt"]


def test_scans_go_by_the_names_that_they_are_given(tmp_path):
    image = np.ones((4, 4, 2), np.int16)
    blob = write_copy(tmp_path / "blobs" / "abc.nii", image).rename(tmp_path / "blobs" / "abc")
    inside = write_copy(tmp_path / "in" / "p8.nii" / "p8.nii", image)
    (tmp_path / "in" / "p7.nii").symlink_to(blob)
    (tmp_path / "in" / "z8.nii").symlink_to(inside)
    (tmp_path / "in" / "p9.nii").symlink_to(tmp_path / "gone.nii")
    assert list(find_scans([tmp_path / "in"])) == ["p7", "p8", "p9"], "each once, also the missing one"
    assert find_scans([tmp_path / "in"])["p7"] == tmp_path / "in" / "p7.nii"
    (tmp_path / "link").symlink_to(tmp_path / "in" / "p8.nii")
    assert find_scans([tmp_path / "link" / ".." / "p7.nii"])["p7"] == tmp_path / "in" / "p7.nii"


def test_skip_bad_segments_the_other_scans(run, tmp_path, capsys):
    image, _ = heart((40, 36, 2, 2), 0, 1)
    for name in "abc":
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", image)
    write_nifti(tmp_path / "in" / "scout.nii.gz", np.zeros((40, 36), np.int16))
    damaged = tmp_path / "in" / "b.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    assert run("--predict", tmp_path / "in", data=None) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert run("--predict", tmp_path / "in", "--skip-bad", data=None) == 0
    rows = read_csv(run.out / "predictions" / "summary.csv")
    assert [row["scan"] for row in rows] == ["a", "c"]
    assert run("--predict", damaged, "--skip-bad", data=None) == 2, "no other is left"
    assert len(read_csv(run.out / "predictions" / "summary.csv")) == 2


def test_a_scan_that_is_not_there_is_told(run, tmp_path, capsys):
    for name in ("none", "none.nii.gz"):
        assert run("--predict", tmp_path / name, data=None) == 2
        assert f"{tmp_path / name}: no such file or folder" in capsys.readouterr().err


def test_bad_scans_are_refused_before_anything_is_written(run, tmp_path, capsys):
    image, _ = heart((40, 36, 2, 2), 0, 1)
    write_nifti(tmp_path / "good.nii.gz", image)
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.nii.gz").write_bytes(b"not a scan")
    write_nifti(tmp_path / "flat.nii.gz", np.zeros((40, 36), np.int16))
    for bad in ("absent.nii.gz", "noise.nii.gz", "flat.nii.gz", "empty", "good.png"):
        assert run("--predict", tmp_path / "good.nii.gz", tmp_path / bad, data=None) == 2
        error = capsys.readouterr().err
        assert bad in error
        assert len(error.splitlines()) == 1
    assert not (run.out / "predictions").exists()
    with pytest.raises(InputError, match="rename one"):
        find_scans([write_copy(tmp_path / k / "same" / "x.nii.gz", image) for k in "ab"])


def write_copy(path, image):
    write_nifti(path, image)
    return path


def test_scores_and_summaries_that_are_none_are_refused(tmp_path):
    (tmp_path / "cases.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"cases.csv: not scores of this program"):
        evaluation.read_scores(tmp_path / "cases.csv")
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match=r"summary.json: not readable as JSON \(not an object\)"):
        read_json(tmp_path / "summary.json")

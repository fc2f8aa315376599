"""The phantom, by which other tests measure: its layout, and that its truth is true."""

import csv
import re

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from cardiac import LABELS, phantom
from cardiac.files import InputError
from cardiac.heart import DISEASES, time_course

FRAMES, SLICES = 6, 5
COUNTS = {"training": 4, "validation": 1, "testing": 4, "unlabelled": 1}
FOLDERS = {"training": "Training/Labeled", "validation": "Validation", "testing": "Testing",
           "unlabelled": "Training/Unlabeled"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "MnM"
    phantom.write_phantom(folder, **COUNTS, frames=FRAMES, slices=SLICES, size=72)
    return folder


@pytest.fixture(scope="module")
def rows(root):
    (path,) = root.glob("*opendataset.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cases():
    """Two hearts of every vendor in pixels of about 1.6 mm, with the truth of all frames."""
    return [phantom.make_case(np.random.default_rng([7, k]), phantom.VENDORS["ABCD"[k % 4]], FRAMES, 7, 128)
            for k in range(8)]


def load(path):
    return np.asanyarray(nib.load(path).dataobj)


def paths(root, row):
    """Image, expert labels, true labels and true displacement of a row of the CSV."""
    code = row["External code"]
    (image,) = root.rglob(f"{code}_sa.nii.gz")
    truth = [root / "truth" / f"{code}_{kind}.nii.gz" for kind in ("sa_gt_all", "displacement")]
    return [image, image.with_name(f"{code}_sa_gt.nii.gz"), *truth]


def test_layout_is_that_of_the_mms_archive(root, rows):
    assert list(rows[0]) == ["", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age",
                             "Pathology", "Sex", "Height", "Weight"]
    codes = {split: [path.name for path in (root / FOLDERS[split]).iterdir()] for split in COUNTS}
    assert {split: len(found) for split, found in codes.items()} == COUNTS
    assert sorted(row["External code"] for row in rows) == sorted(sum(codes.values(), []))
    vendors = {row["External code"]: row["Vendor"] for row in rows}
    assert {vendors[code] for code in codes["training"]} == set("AB")
    assert {vendors[code] for code in codes["testing"]} == set("ABCD")
    assert {vendors[code] for code in codes["unlabelled"]} == {"C"}


def test_files_share_one_grid_and_their_units(root, rows):
    for row in rows:
        image, expert, truth, displacement = map(nib.load, paths(root, row))
        assert image.shape[2:] == (SLICES, FRAMES)
        assert image.get_data_dtype() in (np.int16, np.float64)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        assert 0.7 < image.header.get_zooms()[3] * FRAMES < 1.2  # a heartbeat in seconds
        sizes = nib.affines.voxel_sizes(image.affine)
        np.testing.assert_allclose(sizes, image.header.get_zooms()[:3], rtol=0.02)
        assert displacement.shape == (*image.shape, 2)
        assert displacement.get_data_dtype() == np.float32
        for other in (expert, truth):
            assert other.shape == image.shape
            assert other.get_data_dtype() == np.uint8
            np.testing.assert_array_equal(other.affine, image.affine)


def test_experts_label_ed_and_es_only_and_there_they_are_the_truth(root, rows):
    labelled = [row for row in rows if int(row["ES"]) != int(row["ED"])]
    assert len(labelled) == len(rows) - COUNTS["unlabelled"]
    for row in labelled:
        _, expert, truth, _ = paths(root, row)
        expert, truth = load(expert), load(truth)
        ends = {int(row["ED"]), int(row["ES"])}
        assert set(np.flatnonzero(expert.any((0, 1, 2)))) == ends
        assert truth.any((0, 1, 2)).all()
        for t in ends:
            np.testing.assert_array_equal(expert[..., t], truth[..., t])
            assert set(np.unique(expert[..., t])) == {0, *LABELS.values()}


def test_unlabelled_cases_have_an_empty_ground_truth_and_frames_0(root, rows):
    unlabelled = [row for row in rows if (root / "Training/Unlabeled" / row["External code"]).exists()]
    assert len(unlabelled) == COUNTS["unlabelled"]
    for row in unlabelled:
        assert (row["ED"], row["ES"]) == ("0", "0")
        assert not load(paths(root, row)[1]).any()


def interior(label):
    """Slices with a label in every frame, without the first and the last of them."""
    return np.flatnonzero(label.any((0, 1)).all(1))[1:-1]


def warp(case, t, displacement):
    """ED's label carried to frame t: one-hot, linear, arg max; interior slices (X, Y, Z)."""
    grid = np.indices(case["label"].shape[:2])
    out = []
    for z in interior(case["label"]):
        at = grid + np.moveaxis(displacement[:, :, z, t], -1, 0) / case["zooms"][0]
        moving = case["label"][:, :, z, case["ed"]]
        soft = [map_coordinates(np.float32(moving == k), at, order=1) for k in range(4)]
        out.append(np.argmax(soft, 0))
    return np.stack(out, -1)


def dice(a, b, region):
    a, b = a == region, b == region
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_true_displacement_carries_the_label_of_ed_to_every_frame(cases):
    for case in cases:
        assert not case["displacement"][..., case["ed"], :].any()
        for t in range(FRAMES):
            truth = case["label"][:, :, interior(case["label"]), t]
            warped = warp(case, t, case["displacement"])
            scores = [dice(warped, truth, region) for region in LABELS.values()]
            assert np.mean(scores) > 0.95
            assert min(scores) > 0.93  # a 6 mm wall is 4 pixels of hard labels


def test_displacement_of_another_direction_or_axis_order_does_not(cases):
    for case in cases:
        es, u = case["es"], case["displacement"]
        truth = case["label"][:, :, interior(case["label"]), es]
        right = dice(warp(case, es, u), truth, LABELS["MYO"])
        for wrong in (-u, u[..., ::-1], 0 * u):
            assert dice(warp(case, es, wrong), truth, LABELS["MYO"]) < right - 0.1


def test_image_moves_with_the_tissue(cases):
    """ED's image warped to ES is ES's, except for noise: closer to it than ED's image is."""
    case = cases[0]
    es, ed, z = case["es"], case["ed"], interior(case["label"])[1]
    moving, fixed = (case["image"][:, :, z, t].astype(float) for t in (ed, es))
    at = np.indices(fixed.shape) + np.moveaxis(case["displacement"][:, :, z, es], -1, 0) / case["zooms"][0]
    heart = case["label"][:, :, z, ed] > 0
    after, before = (np.abs(m - fixed)[heart].mean() for m in (map_coordinates(moving, at, order=1), moving))
    assert after < 0.5 * before


def test_map_has_no_fold_and_dies_away_before_the_border(cases):
    for case in cases:
        u = case["displacement"] / case["zooms"][0]
        along_x, along_y = np.gradient(u, axis=0), np.gradient(u, axis=1)
        det = (1 + along_x[..., 0]) * (1 + along_y[..., 1]) - along_x[..., 1] * along_y[..., 0]
        assert det.min() > 0.1
        size = np.linalg.norm(case["displacement"], axis=-1)
        assert max(size[0].max(), size[-1].max(), size[:, 0].max(), size[:, -1].max()) < 2 < size.max()


def test_lv_empties_and_the_wall_keeps_its_volume(cases):
    for case in cases:
        limits = DISEASES[case["pathology"]]
        middle = case["label"][:, :, interior(case["label"])]
        area = {region: (middle == value).sum((0, 1, 2)) for region, value in LABELS.items()}
        ed, es = case["ed"], case["es"]
        assert area["LV"].argmin() == es
        assert area["LV"].argmax() == ed
        short, long = limits.shortening
        kept = 1 - (1 - np.array(limits.ejection)) / (1 - np.array([long, short]))
        assert kept[0] - 0.03 < 1 - area["LV"][es] / area["LV"][ed] < kept[1] + 0.03
        assert 1 / (1 - short) - 0.03 < area["MYO"][es] / area["MYO"][ed] < 1 / (1 - long) + 0.03
        assert area["RV"][es] < 0.95 * area["RV"][ed]


def test_the_base_takes_labels_with_it_as_it_descends(cases):
    there = [case["label"].any((0, 1)) for case in cases]
    lost = [t[:, case["ed"]] & ~t[:, case["es"]] for t, case in zip(there, cases)]
    assert sum(x.any() for x in lost) >= 2
    assert all(x.sum() <= 2 for x in lost)
    assert not any((~t[:, case["ed"]] & t.any(1)).any() for t, case in zip(there, cases))  # none appears
    assert any((~t.any(1)).any() for t in there)  # slices that never show the ventricles


def test_time_is_a_circle_with_a_short_systole():
    for frames, ed, es in ((12, 0, 5), (12, 11, 4), (4, 3, 1)):
        share = np.array(time_course(frames, ed, es))
        assert share[ed] == 0
        assert share[es] == 1
        turned = np.roll(share, -ed)
        systole = (es - ed) % frames
        assert (np.diff(turned[: systole + 1]) > 0).all()
        assert (np.diff(np.append(turned[systole:], 0)) <= 0).all()


def test_ed_is_the_first_or_the_last_frame(cases):
    assert {case["ed"] for case in cases} == {0, FRAMES - 1}


def test_vendors_look_different(cases):
    """Contrast of blood to wall, and noise, as shares of the blood; A and B alike, C and D not."""
    contrast, noise = {}, {}
    for letter, case in zip("ABCD", cases):
        middle = interior(case["label"])[1]
        image, label = (case[kind][:, :, middle, case["ed"]] for kind in ("image", "label"))
        blood = np.median(image[label == LABELS["LV"]])
        contrast[letter] = 1 - np.median(image[label == LABELS["MYO"]]) / blood
        steps = np.abs(np.diff(image.astype(float), axis=0))[(label == LABELS["LV"])[1:]]
        noise[letter] = np.median(steps) / blood  # the few papillary muscles do not change it
    assert abs(contrast["A"] - contrast["B"]) < 0.12
    assert contrast["C"] < min(contrast["A"], contrast["B"]) - 0.15
    assert noise["D"] > 1.5 * max(noise["A"], noise["B"])


def test_a_case_depends_on_its_number_only(root, rows, tmp_path):
    like = {"frames": FRAMES, "slices": SLICES, "size": 72}
    phantom.write_phantom(tmp_path / "few", training=1, validation=0, testing=2, unlabelled=1, **like)
    again = sorted(path.relative_to(tmp_path / "few") for path in (tmp_path / "few").rglob("*.nii.gz"))
    assert len(again) == 4 * 4
    for path in again:
        np.testing.assert_array_equal(load(tmp_path / "few" / path), load(root / path))
    phantom.write_phantom(tmp_path / "other", training=1, validation=0, testing=0, seed=1, **like)
    path = next((tmp_path / "other" / "Training/Labeled").rglob("*_sa.nii.gz"))
    other, first = load(path), load(root / path.relative_to(tmp_path / "other"))
    assert other.shape != first.shape or (other != first).any()


def test_codes_are_unique_and_look_like_those_of_mms():
    codes = [phantom._code(1_000_000 * split + k) for split in range(4) for k in range(1000)]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch("([A-Z][0-9]){3}", code) for code in codes)


def test_a_phantom_is_replaced_and_anything_else_is_left_alone(tmp_path, capsys):
    few = ["--validation=0", "--testing=0", "--unlabelled=0", "--frames=4", "--slices=1", "--size=32"]
    assert phantom.main([str(tmp_path / "new"), "--training", "2", *few]) == 0
    assert phantom.main([str(tmp_path / "new"), "--training", "1", *few]) == 0
    assert len(list((tmp_path / "new").rglob("*_sa.nii.gz"))) == 1

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.txt").write_text("keep")
    assert phantom.main([str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["scan.txt"]
    assert phantom.main([str(tmp_path / "mine" / "scan.txt")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "not empty and not a phantom" in lines[0]


@pytest.mark.parametrize("name", list(phantom.OPTIONS))
def test_numbers_that_are_too_small_are_refused(name, tmp_path):
    least = phantom.OPTIONS[name][1]
    with pytest.raises(InputError, match=f"--{name} {least - 1}"):
        phantom.write_phantom(tmp_path / "new", **{name: least - 1})
    assert not (tmp_path / "new").exists()

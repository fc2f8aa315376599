"""Labels through time: which frames, by which motion, how far to trust them, and what has no label.

`follower` stands in for a trained registration: it finds the shift between two slices from their centres of
mass, so that the propagation of labels is tested and not the network.
"""

import csv
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from datasets import MMS_CASES, SPACING, Tiny, heart, write_mms, write_nifti, write_table
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import propagation
from cardiac.cache import open_cache
from cardiac.files import InputError
from cardiac.losses import IGNORED
from cardiac.propagation import Propagated, frames_between, own_grid_displacement, warp_labels
from cardiac.settings import Settings
from cardiac.slices import SliceStore
from cardiac.warp import warp

SHORT = ["--size=32", "--spacing=2", "--max-steps=2", "--steps-per-epoch=2", "--batch-size=2", "--workers=1"]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_pictures")
SIDE = 48


def centre_of_mass(images):
    weights = images[:, 0] / images[:, 0].sum((-2, -1), keepdim=True).clamp(min=1e-6)
    grid = torch.meshgrid(*[torch.arange(float(n)) for n in images.shape[-2:]], indexing="ij")
    return torch.stack([(weights * axis).sum((-2, -1)) for axis in grid], dim=1)


def shifted(images, shift):
    """The half-resolution velocity of a shift (B, 2) in full-resolution pixels."""
    half = [n // 2 for n in images.shape[-2:]]
    return (shift / 2)[:, :, None, None].expand(-1, -1, *half)


def follower(moving, fixed, regions):
    """warped(x) = moving(x + u): u leads from the fixed slice to the moving one."""
    return shifted(moving, centre_of_mass(moving) - centre_of_mass(fixed))


def standstill(moving, fixed, regions):
    return shifted(moving, torch.zeros(len(moving), 2))


def drifter(moving, fixed, regions):
    """A field that the way back does not undo."""
    return shifted(moving, torch.tensor([[3.0, 0.0]]).repeat(len(moving), 1))


# ------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("start", "end", "frames", "expected"),
    [
        (0, 3, 10, [1, 2]),
        (9, 2, 10, [0, 1]),  # ED is the last frame
        (7, 2, 10, [8, 9, 0, 1]),  # ES before ED
        (3, 0, 10, [4, 5, 6, 7, 8, 9]),
        (0, 1, 10, []),
        (9, 0, 10, []),
        (0, 1, 2, []),
        (1, 0, 2, []),
    ],
)
def test_time_is_a_circle(start, end, frames, expected):
    assert frames_between(start, end, frames) == expected


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(0, 39), st.integers(0, 39))
def test_systole_and_diastole_are_all_other_frames(frames, ed, es):
    ed, es = ed % frames, es % frames
    if ed != es:
        both = frames_between(ed, es, frames) + frames_between(es, ed, frames)
        assert sorted([*both, ed, es]) == list(range(frames))


# ---------------------------------------------------------------------------------------- a heart that swings

SHIFTS = ((0, 0), (3, -1), (5, -3), (-2, 4), (-3, 2), (1, 1))  # pixels, by frame


@pytest.fixture(scope="module")
def swinging(tmp_path_factory):
    """(cache, case, truth (T, Z, S, S)): one case, ED at frame 1, ES at 4, no label in slice 2 at ED."""
    root = tmp_path_factory.mktemp("swinging")
    tiny = Tiny("A0A0A0", ed=1, es=4)
    _, labels = heart((SIDE, SIDE, 3, 6), 0, 2)
    truth = np.stack([np.roll(labels[..., 0], shift, axis=(0, 1)) for shift in SHIFTS], axis=-1)
    image = np.array([0, 200, 90, 180], np.int16)[truth]
    experts = np.zeros_like(truth)
    experts[..., [1, 4]] = truth[..., [1, 4]]
    experts[:, :, 2, 1] = 0
    folder = root / "MnM" / tiny.folder / tiny.code
    write_nifti(folder / "A0A0A0_sa.nii.gz", image, (2.0, 2.0, 8.0))
    write_nifti(folder / "A0A0A0_sa_gt.nii.gz", experts, (2.0, 2.0, 8.0))
    write_table(root / "MnM" / "opendataset.csv", [tiny])
    cache = open_cache(Settings(data=root / "MnM", cache=root, size=SIDE, spacing=2.0, workers=1))
    return cache, cache.cases[0], truth.transpose(3, 2, 0, 1)


def carried(swinging, network, frames, steps=0):
    cache, case, _ = swinging
    store = SliceStore(cache, [case], CPU)
    found = propagation.propagate_interval(network, store, "ED", "ES", frames, False, steps)
    return found.labels, found.confidence, found.folding


@pytest.mark.parametrize("frame", [2, 3, 4, 5, 0])
def test_labels_move_with_the_heart(swinging, frame):
    labels, confidence, folding = carried(swinging, follower, [frame])
    truth = swinging[2][frame]
    assert labels.shape == (1, 3, SIDE, SIDE)
    assert labels.dtype == np.uint8
    for z in (0, 1):
        assert set(np.unique(labels[0, z])) == {0, 1, 2, 3}
        assert (labels[0, z] != truth[z]).mean() < 0.003, "the label is not where the heart is"
    moved = np.abs(np.array(SHIFTS[frame]) - SHIFTS[1]).sum()
    assert (carried(swinging, standstill, [frame])[0][0, 0] != truth[0]).mean() > 0.01 * moved
    assert (confidence[0, :2] > 0.97).all()
    assert (folding[0, :2] == 0).all()


@pytest.mark.parametrize("steps", [0, 3])
def test_several_frames_at_once_equal_one_by_one(swinging, steps):
    together = carried(swinging, follower, [3, 2], steps)
    for k, frame in enumerate([3, 2]):
        for one, other in zip(carried(swinging, follower, [frame], steps), together):
            np.testing.assert_allclose(one[0], other[k], atol=1e-5)


def hasty(*slices):
    """Overshoots by 30 %."""
    return 1.3 * follower(*slices)


def test_a_network_that_moves_labels_too_far_is_put_right_by_the_images(swinging):
    def wrong(steps):
        return (carried(swinging, hasty, [3], steps)[0][0, :2] != swinging[2][3][:2]).mean()

    assert wrong(20) < 0.5 * wrong(0)


def test_refinement_fits_the_images_and_what_the_network_alone_left_is_kept(swinging):
    cache, case, _ = swinging
    store = SliceStore(cache, [case], CPU)
    plain, found = (propagation.carry(hasty, store, case.ed, [2, 3], steps) for steps in (0, 5))
    assert torch.equal(plain.residual, plain.unrefined)
    assert torch.equal(found.unrefined, plain.unrefined)
    assert found.residual.mean() < 0.5 * plain.residual.mean()


def test_a_field_that_does_nothing_is_fully_trusted_and_one_that_is_not_undone_is_not(swinging):
    assert carried(swinging, standstill, [3])[1][0, :2] == pytest.approx([1, 1])
    wrong = carried(swinging, drifter, [3])[1][0, :2]
    assert (wrong < 0.8).all()
    assert (wrong >= 0).all()


def test_dilation_reaches_so_many_pixels_to_every_side():
    masks = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)) > 0.98
    for pixels in (0, 1, 3.4):
        width = 2 * round(pixels) + 1
        expected = torch.nn.functional.max_pool2d(masks[:, None].float(), width, 1, width // 2)[:, 0] > 0
        assert torch.equal(propagation._dilate(masks, pixels), expected)


def test_quality_counts_folds_within_10_mm_of_either_label_and_within_its_slice():
    source, target = np.zeros((2, 60, 60, 2), np.uint8)
    source[10, 10, 0] = target[40, 40, 0] = 1
    determinant = np.ones((2, 60, 60))  # (Z, X, Y)
    determinant[0, 10, 15] = determinant[0, 36, 37] = 0  # 10 mm off
    determinant[0, 10, 16] = determinant[0, 36, 36] = -1  # more than that
    determinant[1] = -1
    found = propagation._score_own_grid(source, target, source, (2.0, 2.0, 8.0), determinant)["LV"]
    near = 2 * 81  # pixels within five of either
    assert found["folding_percent"] == pytest.approx(100 * 2 / near)
    share = 2 / near
    assert found["sd_log_jacobian"] == pytest.approx(-np.log(1e-3) * (share * (1 - share)) ** 0.5)
    assert found["dice_before"] == found["dice_after"] == 0


@pytest.mark.parametrize(("size", "expected"), [(SIDE, 100), (3, 0)])
def test_folding_counts_near_the_heart_alone(swinging, monkeypatch, size, expected):
    displacement = torch.zeros(3, 2, SIDE, SIDE)
    displacement[:, 0, :size, :size] = -3 * torch.arange(float(size))[:, None]  # a mirror: det J = -2
    monkeypatch.setattr(propagation, "displacements", lambda velocity, size: displacement)
    assert carried(swinging, standstill, [3])[2][0, :2] == pytest.approx([expected] * 2)


def words(frames, trust=False):
    """The settings that `propagate` reads."""
    return SimpleNamespace(frames=frames, trust=trust, refine=0)


def test_a_slice_that_one_phase_lacks_comes_from_the_other_in_the_nearer_half(swinging):
    cache, case, _ = swinging  # ED 1, ES 4 of 6 frames; ED lacks slice 2
    propagated, rows = propagate_labels.propagate(follower, cache, [case], words("all", True), CPU)
    assert {frame for _, frame, z in propagated.where if z == 2} == {3, 5}
    assert {frame for _, frame, z in propagated.where if z == 1} == {0, 2, 3, 5}
    sources = {(row["frame"], row["slice"]): row["source"] for row in rows}
    faults = {(row["frame"], row["slice"]): row["fault"] for row in rows}
    assert [faults[frame, 2] for frame in (2, 3, 5, 0)] == ["given up", "", "", "given up"]
    assert [sources[frame, 2] for frame in (2, 3, 5, 0)] == ["", "ES", "ES", ""]
    assert {sources[frame, 1] for frame in (2, 3, 5, 0)} == {"ED+ES"}
    assert len(propagated.trust) == len(propagated.labels)


def test_withheld_phases_are_labelled_and_the_known_one_is_the_source(swinging):
    cache, case, _ = swinging
    for withheld, expected in ((case.es, [2, 3, 4]), (case.ed, [1, 2, 3])):
        known = dataclasses.replace(case, withheld=(withheld,))
        for trust in (False, True):
            propagated, rows = propagate_labels.propagate(
                follower, cache, [known], words("systole", trust), CPU
            )
            assert sorted({frame for _, frame, _ in propagated.where}) == expected
            assert {row["source"] for row in rows} - {""} == {"ED" if withheld == case.es else "ES"}
        spans = propagation.intervals(known, "all")
        assert sorted(f for *_, frames in spans for f in frames) == sorted({0, 2, 3, 5, withheld})


def test_where_es_is_not_known_the_rv_of_the_base_is_background_at_es(tmp_path):
    data = write_mms(tmp_path / "MnM", [Tiny("A0A0A0", ed=0, es=2)], (40, 36, 5, 5))
    cache = open_cache(Settings(data=data, cache=tmp_path, size=32, spacing=2.0, workers=1))
    (case,) = cache.cases
    shown = {}
    for withheld in ((), (case.es,)):
        store = SliceStore(cache, [dataclasses.replace(case, withheld=withheld)], CPU)
        frames = [1, 2] if withheld else [1]
        found = propagation.propagate_interval(standstill, store, "ED", "ES", frames, True)
        shown[withheld] = [[set(np.unique(labels)) for labels in frame] for frame in found.labels]
    everywhere = [{0, 1, 2, 3}] * 5
    assert shown == {(): [everywhere], (case.es,): [everywhere, [{0, 1, 2}, *everywhere[1:]]]}


def test_a_slice_without_a_label_at_ed_is_unlabelled_and_never_background(swinging, capsys):
    cache, case, _ = swinging
    propagated, rows = propagate_labels.propagate(follower, cache, [case], words("systole"), CPU)
    assert propagated.where == [("A0A0A0", frame, z) for frame in (2, 3) for z in (0, 1)]
    assert len(propagated.labels) == len(propagated.confidence) == 4
    assert len(rows) == 6
    for row in rows:
        assert row["kept"] == (row["slice"] != 2)
        assert (row["source"] == "ED") == bool(row["kept"])
        assert np.isnan(row["confidence"]) == np.isnan(row["folding_percent"]) == (row["slice"] == 2)
    by_frame = propagated.of(case)
    assert set(by_frame) == {2, 3}
    assert (by_frame[2][2] == IGNORED).all()
    assert (by_frame[2][:2] != IGNORED).all()
    assert "2 left out (no label to carry" in capsys.readouterr().out


def test_frames_all_has_diastole_too(swinging):
    cache, case, _ = swinging
    propagated, _ = propagate_labels.propagate(follower, cache, [case], words("all"), CPU)
    assert {frame for _, frame, _ in propagated.where} == {0, 2, 3, 5}


def test_carried_to_es_beside_the_identity(swinging):
    cache, case, _ = swinging
    store = SliceStore(cache, [case], CPU)
    identity, still = propagation.carried_to_es(standstill, store)
    assert still == pytest.approx(identity)
    before, after = propagation.carried_to_es(follower, store)
    assert before == pytest.approx(identity)
    assert after > before + 0.15


def test_on_the_own_grid_the_experts_labels_are_kept(swinging):
    cache, case, truth = swinging
    propagated, _ = propagate_labels.propagate(follower, cache, [case], words("systole"), CPU)
    labels = propagate_labels.on_own_grid(cache, case, propagated)
    expert = np.asarray(nib.load(case.labels[0]).dataobj)
    assert labels.shape == case.shape
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[..., [1, 4]], expert[..., [1, 4]])
    assert not labels[..., [0, 5]].any()
    assert not labels[:, :, 2, [2, 3]].any()
    for frame in (2, 3):
        assert (labels[..., :2, frame] != truth[frame][:2].transpose(1, 2, 0)).mean() < 0.003


@pytest.mark.parametrize("withheld", [(), (1,), (4,)])
def test_quality_carries_the_label_of_ed_whether_training_knows_it_or_not(swinging, withheld):
    cache, case, truth = swinging
    seen = []

    def guided(moving, fixed, regions):
        seen.append(regions.sum(1) > 0)
        return follower(moving, fixed, regions)

    case = dataclasses.replace(case, withheld=withheld)
    rows = propagation.score_registration(guided, cache, [case], Settings(workers=1), CPU)
    assert all(row["dice_after"] > row["dice_before"] + 0.15 for row in rows)
    assert torch.cat(seen)[:2].any((1, 2)).all()


def test_quality_of_a_perfect_registration_is_perfect_on_the_own_grid(swinging):
    cache, case, _ = swinging
    settings = Settings(workers=1)
    perfect, still = (
        propagation.score_registration(network, cache, [case], settings, CPU)
        for network in (follower, standstill)
    )
    assert [row["region"] for row in perfect] == ["LV", "MYO", "RV"]
    assert set(perfect[0]) == set(propagation.QUALITY)
    for row, other in zip(perfect, still):
        assert row["dice_before"] == other["dice_before"] == other["dice_after"] < 0.75
        assert row["dice_after"] > row["dice_before"] + 0.15
        assert row["folding_percent"] == 0
        assert row["sd_log_jacobian"] == pytest.approx(0, abs=1e-3)


# ------------------------------------------------------------------------------------------------- labels


def test_warped_labels_are_soft_until_one_arg_max():
    labels = torch.zeros(1, 24, 24, dtype=torch.uint8)
    labels[0, 8:16, 8:16] = 2
    labels[0, 10:14, 10:14] = 1
    displacement = torch.zeros(1, 2, 24, 24)
    assert torch.equal(warp_labels(labels, displacement), labels)
    displacement[:, 0] = 0.4
    assert torch.equal(warp_labels(labels, displacement), labels), "less than half a pixel changes no label"
    displacement[:, 0] = 3
    assert torch.equal(warp_labels(labels, displacement)[0, 5:13], labels[0, 8:16])


def test_ignored_pixels_become_background_never_a_region():
    labels = torch.full((1, 16, 16), IGNORED, dtype=torch.uint8)
    assert not warp_labels(labels, torch.randn(1, 2, 16, 16)).any()


def test_a_displacement_on_the_own_grid_is_the_same_motion_in_its_pixels(tiny_data, tmp_path):
    cache = open_cache(Settings(data=tiny_data, cache=tmp_path, size=32, spacing=2.0, workers=1))
    case = cache.cases[0]
    shift = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(3, 2, 32, 32)  # 6 mm, -4 mm
    found = own_grid_displacement(shift, case.grid(cache))
    assert found.shape == (3, 2, *case.shape[:2])
    assert found[:, 0].numpy() == pytest.approx(6 / SPACING[0], abs=1e-4)
    assert found[:, 1].numpy() == pytest.approx(-4 / SPACING[1], abs=1e-4)
    image = torch.zeros(3, 1, *case.shape[:2])
    assert warp(image, found).shape == image.shape


def test_labels_there_and_back(tmp_path):
    labels = np.random.default_rng(0).integers(0, 4, (3, 16, 16), np.uint8)
    written = Propagated(labels, [("A", 0, 2), ("A", 5, 0), ("B", 1, 1)], np.float32([0.5, 1, 0.25]))
    written.write(tmp_path / "labels.h5", "registration of step 3")
    found = Propagated.read(tmp_path / "labels.h5")
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.confidence, written.confidence)
    assert found.where == written.where
    assert propagation.made_from(tmp_path / "labels.h5") == "registration of step 3"


@pytest.mark.parametrize("damage", ["text", "no case", "case is a number", "labels is a folder"])
def test_a_damaged_file_of_labels_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "labels.h5"
    if damage == "text":
        path.write_text("no HDF5")
    else:
        Propagated(np.zeros((0, 8, 8), np.uint8), [], []).write(path, "x")
        with h5py.File(path, "a") as file:
            name = damage.split()[-1] if damage == "no case" else damage.split()[0]
            del file[name]
            if damage == "case is a number":
                file["case"] = 3
            elif damage == "labels is a folder":
                file.create_group("labels")
    with pytest.raises(InputError, match=r"labels\.h5: not readable"):
        Propagated.read(path)


# ------------------------------------------------------------------------------------------- the script


@pytest.fixture
def run(trained_run, tmp_path):
    """(words, out): a copy of the shared run that a test may change."""
    data, out = trained_run
    shutil.copytree(out, tmp_path / "run")
    cache = str(out.parent / "cache")
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--cache", cache, "--workers", "1"]
    return words, tmp_path / "run"


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_writes_labels_of_the_frames_between_for_training_cases(trained_run):
    _, out = trained_run
    rows = csv_rows(out / "propagation" / "quality.csv")
    assert tuple(rows[0]) == propagate_labels.COLUMNS
    assert {(row["case"], row["frame"]) for row in rows} == {("A0A0A0", "1"), ("B0B0B0", "0")}
    assert len(rows) == 6
    propagated = Propagated.read(out / "propagation" / "labels.h5")
    assert propagated.labels.shape == (6, 32, 32)
    assert propagated.where == [(row["case"], int(row["frame"]), int(row["slice"])) for row in rows]
    assert (out / "propagation" / "cine.gif").read_bytes()[:4] == b"GIF8"


def test_nifti_on_the_own_grid_with_the_experts_frames_and_not_written_twice(run, capsys):
    words, out = run
    assert propagate_labels.main([*words, "--nifti"]) == 0
    assert "finished" in capsys.readouterr().out
    folder = out / "propagation" / "nifti"
    assert len(list(folder.iterdir())) == 2
    for tiny in MMS_CASES[:2]:
        case = Path(words[1]) / tiny.folder / tiny.code
        source = nib.load(case / f"{tiny.code}_sa.nii.gz")
        expert = np.asarray(nib.load(case / f"{tiny.code}_sa_gt.nii.gz").dataobj)
        found = nib.load(folder / f"{tiny.code}_sa_propagated.nii.gz")
        labels = np.asarray(found.dataobj)
        np.testing.assert_array_equal(found.affine, source.affine)
        assert found.header.get_zooms() == pytest.approx(source.header.get_zooms())
        assert (labels.shape, labels.dtype) == (source.shape, np.uint8)
        np.testing.assert_array_equal(labels[..., [tiny.ed, tiny.es]], expert[..., [tiny.ed, tiny.es]])
        between = frames_between(tiny.ed, tiny.es, 5)
        assert labels.any((0, 1, 2)).nonzero()[0].tolist() == sorted([tiny.ed, tiny.es, *between])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert propagate_labels.main([*words, "--nifti"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unfinished_registration_is_told(run, capsys):
    words, out = run
    (out / "registration" / "quality.csv").unlink()
    assert propagate_labels.main(words) == 0
    assert "not finished; using its best weights so far, of step" in capsys.readouterr().out


def test_frames_all_through_the_script(run):
    words, out = run
    assert propagate_labels.main([*words, "--frames", "all"]) == 2, "contradicts the run that is there"
    assert propagate_labels.main([*words, "--frames", "all", "--overwrite"]) == 0
    frames = {(row["case"], int(row["frame"])) for row in csv_rows(out / "propagation" / "quality.csv")}
    assert frames == {("A0A0A0", t) for t in (1, 3, 4)} | {("B0B0B0", t) for t in (0, 2, 3)}


def test_labels_of_an_older_registration_are_made_anew(run, capsys):
    words, out = run
    assert propagate_labels.main([*words, "--nifti"]) == 0
    labels = out / "propagation" / "nifti" / "A0A0A0_sa_propagated.nii.gz"
    written = labels.stat().st_mtime_ns
    before = propagation.made_from(out / "propagation" / "labels.h5")
    assert train_registration.main([*words, *SHORT, "--lr", "0.002", "--overwrite"]) == 0
    assert propagate_labels.main(words) == 0
    assert propagation.made_from(out / "propagation" / "labels.h5") != before
    assert labels.stat().st_mtime_ns > written, "--nifti is one of the run's settings"

    path = out / "propagation" / "labels.h5"
    propagated = Propagated.read(path)
    assert train_segmentation.main(words) == 0, "redone, but the same: nothing had been learnt"
    propagated.labels[0, :4] = 1
    propagated.write(path, propagation.made_from(path))
    before = (out / "segmentation" / "original" / "last.pt").read_bytes()
    more = [*words, "--max-steps", "6"]
    assert train_segmentation.main(more) == 2, "the run there was trained on the older labels"
    assert "other propagated labels; use --labels propagated --overwrite or" in capsys.readouterr().err
    assert (out / "segmentation" / "original" / "last.pt").read_bytes() == before, "nor is the other trained"
    words += ["--overwrite", "--labels", "propagated"]
    assert train_segmentation.main([*words, *SHORT, "--channels=1"]) == 2, "original has 2 channels"
    assert train_segmentation.main([*words, *SHORT]) == 0


def test_labels_of_a_case_that_has_changed_are_made_anew(run, tmp_path):
    words, out = run
    data = shutil.copytree(words[1], tmp_path / "data" / Path(words[1]).name)
    case = data / MMS_CASES[0].folder / "A0A0A0" / "A0A0A0_sa_gt.nii.gz"
    labels = nib.load(case)
    moved = np.asarray(labels.dataobj)[..., [0, 1, 3, 2, 4]]
    nib.save(nib.Nifti1Image(moved, None, labels.header), case)
    table = next(data.glob("*.csv"))
    table.write_text(table.read_text().replace("A0A0A0,Siemens,A,1,0,2", "A0A0A0,Siemens,A,1,0,3"))
    words[1] = str(data)
    assert propagate_labels.main([*words, "--cache", str(tmp_path / "cache")]) == 0
    rows = csv_rows(out / "propagation" / "quality.csv")
    assert {row["frame"] for row in rows if row["case"] == "A0A0A0"} == {"1", "2"}


def test_labels_of_another_registration_are_refused(run, capsys):
    words, out = run
    words += ["--cache", str(out / "cache")]
    assert train_registration.main([*words, "--max-steps", "5"]) == 0
    assert train_segmentation.main([*words, "--max-steps", "5"]) == 0, "a run begun with them resumes"
    assert train_registration.main([*words, *SHORT, "--lr", "0.002", "--overwrite"]) == 0
    assert train_segmentation.main([*words, "--overwrite"]) == 2
    assert "from another registration than OUT's; run propagate_labels.py" in capsys.readouterr().err
    assert train_registration.main([*words, *SHORT, "--labelled-phases", "ED", "--overwrite"]) == 0
    assert train_segmentation.main([*words, "--overwrite"]) == 2
    assert "labelled_phases is both there, ED here; run propagate_labels.py" in capsys.readouterr().err


def test_labels_of_another_grid_are_refused(run, capsys):
    words, _ = run
    words += ["--cache", str(run[1] / "cache")]
    assert train_registration.main([*words, *SHORT, "--size", "48", "--overwrite"]) == 0
    assert train_segmentation.main([*words, "--overwrite", "--channels", "1", "--max-steps", "1"]) == 2
    assert "size is 32 there, 48 here; run propagate_labels.py" in capsys.readouterr().err


# ------------------------------------------------------------------------------- data that lacks something


def test_two_frames_have_nothing_between_and_original_is_trained_alone(tmp_path, capsys):
    cases = [Tiny("A0A0A0", ed=0, es=1), Tiny("B0B0B0", ed=1, es=0), Tiny("V0V0V0", "Validation", ed=0, es=1)]
    write_mms(tmp_path / "two", cases, shape=(40, 36, 3, 2))
    words = ["--data", str(tmp_path / "two"), "--out", str(tmp_path / "run")]
    assert train_registration.main([*words, *SHORT]) == 0
    capsys.readouterr()
    assert propagate_labels.main([*words, "--nifti"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "lies between ED and ES" in line]
    assert len(lines) == 1
    folder = tmp_path / "run" / "propagation"
    assert len(Propagated.read(folder / "labels.h5").labels) == 0
    assert csv_rows(folder / "quality.csv") == []
    assert (folder / "quality.csv").read_text().startswith("case,vendor,frame,slice,")
    assert (folder / "nifti" / "A0A0A0_sa_propagated.nii.gz").exists()

    segmentation = [*words, *SHORT, "--channels", "1"]
    assert train_segmentation.main([*segmentation, "--labels", "propagated"]) == 2
    assert "--labels original" in capsys.readouterr().err
    assert train_segmentation.main(segmentation) == 0
    assert "nothing was propagated" in capsys.readouterr().out
    trained = tmp_path / "run" / "segmentation"
    assert [path.name for path in trained.iterdir()] == ["original"]
    assert (trained / "original" / "best.pt").exists()


def test_without_validation_the_patient_held_out_may_be_the_only_one_of_a_vendor(tmp_path):
    write_mms(tmp_path / "bare", [Tiny("A0A0A0"), Tiny("B0B0B0", vendor="B", ed=4, es=1)])
    words = ["--data", str(tmp_path / "bare"), "--out", str(tmp_path / "run"), *SHORT]
    assert train_segmentation.main([*words, "--labels", "original", "--channels", "1"]) == 0
    (row, *_) = csv_rows(tmp_path / "run" / "segmentation" / "original" / "log.csv")
    assert float(row["val_dice_LV"]) >= 0
    assert "unseen_dice" not in row
    assert evaluate.main([*words[:4], "--split", "Training", "--workers", "1"]) == 0
    caption = (tmp_path / "run" / "evaluation" / "table.md").read_text()
    assert "TRAINED ON 1 OF THESE CASES. Some were used in validation" in caption
    assert "1 patient, of vendor" in caption
    assert "unlabelled" not in caption


def test_without_validation_the_held_out_patient_gives_no_labels_to_training(tmp_path, capsys):
    write_mms(tmp_path / "bare", [Tiny("A0A0A0"), Tiny("B0B0B0", vendor="B", ed=4, es=1), Tiny("C0C0C0")])
    words = ["--data", str(tmp_path / "bare"), "--out", str(tmp_path / "run")]
    assert train_registration.main([*words, *SHORT]) == 0
    assert propagate_labels.main(words) == 0
    assert len(Propagated.read(tmp_path / "run" / "propagation" / "labels.h5").labels) == 9
    capsys.readouterr()
    assert train_segmentation.main([*words, *SHORT, "--channels", "1"]) == 0
    out = capsys.readouterr().out
    assert "held out for validation: 1 of 3 training patients" in out
    assert "propagated: 12 expert slices + 6 propagated" in out


def test_a_validation_that_comes_later_does_not_change_what_a_run_is_trained_on(tmp_path, capsys):
    patients = [Tiny("A0A0A0"), Tiny("B0B0B0", vendor="B", ed=4, es=1), Tiny("C0C0C0", vendor="C")]
    came = [Tiny("V0V0V0", "Validation", vendor="A"), Tiny("V1V1V1", "Validation", vendor="B")]
    write_mms(tmp_path / "bare", [*patients, Tiny("T0T0T0", "Testing")])
    words = ["--data", str(tmp_path / "bare"), "--out", str(tmp_path / "run")]
    train = [*words, *SHORT, "--channels", "1", "--labels", "original"]
    assert train_segmentation.main(train) == 0
    assert evaluate.main(words) == 0
    table = tmp_path / "run" / "evaluation" / "table.md"
    before = table.read_text()
    assert "2 patients, of vendor" in before
    write_mms(tmp_path / "more", [*patients, Tiny("T0T0T0", "Testing"), *came])
    shutil.rmtree(tmp_path / "bare")
    (tmp_path / "more").rename(tmp_path / "bare")
    assert evaluate.main([*words, "--overwrite"]) == 0
    assert table.read_text() == before
    capsys.readouterr()
    train[train.index("--max-steps=2")] = "--max-steps=4"
    assert train_segmentation.main(train) == 0
    assert "original: 12 expert slices" in capsys.readouterr().out
    assert train_segmentation.main([*train, "--held-out", "A0A0A0", "B0B0B0"]) == 2
    assert "contradicts --held-out" in capsys.readouterr().err
    other_model = ["propagated" if word == "original" else word for word in train]
    assert train_segmentation.main([*other_model, "--held-out", "A0A0A0", "B0B0B0"]) == 2, "unfair to compare"
    assert "contradicts --held-out" in capsys.readouterr().err
    for out, held_out in (("other", ["A0A0A0", "B0B0B0"]), ("new", [])):
        train[train.index("--out") + 1] = str(tmp_path / out)
        assert train_segmentation.main([*train, *(held_out and ["--held-out", *held_out])]) == 0
        slices = 6 if held_out else 18
        assert f"original: {slices} expert slices" in capsys.readouterr().out

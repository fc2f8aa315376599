"""The slice cache: geometry there and back, labels, when it is rebuilt and why, and how cases are split."""

import csv
import dataclasses
import multiprocessing
import os
import pickle

import h5py
import nibabel as nib
import numpy as np
import pytest
from datasets import MMS_CASES, SPACING, TABLE, Tiny, heart, write_acdc, write_mms, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st

from cardiac import cache as cache_module
from cardiac.cache import Cache, CachedCase, Grid, most_likely, one_hot, open_cache, to_slices
from cardiac.cache import resampling_matrix as matrix
from cardiac.cases import load_case
from cardiac.files import InputError
from cardiac.settings import Settings

# ------------------------------------------------------------ geometry

pairs = {"shape": st.integers(40, 75), "spacing": st.floats(0.8, 2.0), "centre": st.integers(19, 24)}
grids = st.builds(
    Grid,
    **{name: st.tuples(each, each) for name, each in pairs.items()},
    size=st.sampled_from([32, 48, 64]),
    target=st.floats(0.8, 2.5),
) | st.builds(Grid, st.just((53, 64)), st.just((1.1, 1.7)), st.just(48), st.floats(0.8, 2.5))


def in_mm(n, spacing, centre=None):
    """Positions of n pixels, mm from the centre."""
    return (np.arange(n) - ((n - 1) / 2 if centre is None else centre)) * spacing


def own_axes(grid):
    """Positions of a grid's own pixels along both axes, mm from the centre of its slices."""
    return [in_mm(*each) for each in zip(grid.shape, grid.spacing, grid.centre or (None, None))]


def ramp(x, y):
    return 5 + 0.3 * x[:, None] - 0.2 * y


def covered(axis, other):
    """Pixels of an axis that lie 5 mm and more inside another axis."""
    return (axis > other[0] + 5) & (axis < other[-1] - 5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids)
def test_a_ramp_has_the_same_value_at_the_same_place_there_and_back(grid):
    own = own_axes(grid)
    crop = in_mm(grid.size, grid.target)
    slices = grid.to_slices(ramp(*own)[None])[0]
    assert slices.shape == (grid.size, grid.size)
    seen = [covered(crop, axis) for axis in own]
    steps = [grid.target / spacing for spacing in grid.spacing]
    # towards a coarser grid the sampled triangle's centre is off by a few hundredths of a pixel
    tolerance = 0.002 if max(steps) <= 1 else 0.1
    np.testing.assert_allclose(slices[np.ix_(*seen)], ramp(crop, crop)[np.ix_(*seen)], atol=tolerance)

    planes = grid.from_slices(ramp(crop, crop)[None], "edge")[0]
    assert planes.shape == grid.shape
    seen = [covered(axis, crop) for axis in own]
    tolerance = 0.002 if min(steps) >= 1 else 0.1
    np.testing.assert_allclose(planes[np.ix_(*seen)], ramp(*own)[np.ix_(*seen)], atol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(grids, st.floats(-3, 3), st.floats(-3, 3))
def test_a_disc_keeps_its_place_and_area_there_and_back(grid, x0, y0):
    own, crop = own_axes(grid), [in_mm(grid.size, grid.target)] * 2
    disc = np.hypot(own[0][:, None] - x0, own[1] - y0) < 9
    shares = grid.to_slices(one_hot(disc))[0]
    labels = grid.labels_to_slices(disc.astype(np.uint8))
    back = grid.from_slices(one_hot(labels))[0]
    pixels = np.prod(grid.spacing), grid.target**2

    for one, other in (((disc, own, pixels[0]), (shares, crop, pixels[1])),
                       ((labels, crop, pixels[1]), (back, own, pixels[0]))):  # fmt: skip
        (area, *place), (other_area, *other_place) = moments(*one), moments(*other)
        assert other_area == pytest.approx(area, rel=0.05)
        assert other_place == pytest.approx(place, abs=0.25)
    area, *place = moments(labels, crop, pixels[1])
    assert area == pytest.approx(np.pi * 81, rel=0.2)
    assert place == pytest.approx([x0, y0], abs=1.5), "a hard label is right to a pixel"


def moments(shares, axes, pixel):
    """Area in mm2, and the centre of mass in mm."""
    x, y = ((shares.sum(1 - k) * axis).sum() / shares.sum() for k, axis in enumerate(axes))
    return shares.sum() * pixel, x, y


def test_the_same_grid_changes_nothing():
    grid = Grid((48, 48), (1.3, 1.3), 48, 1.3)
    planes = np.random.default_rng(0).random((2, 48, 48), np.float32)
    np.testing.assert_allclose(grid.to_slices(planes), planes, atol=1e-6)
    np.testing.assert_allclose(grid.from_slices(planes), planes, atol=1e-6)


def test_crop_and_pad_keep_the_centres_on_each_other():
    planes = np.zeros((1, 20, 51), np.float32)
    planes[0, 9:11, 25] = 1  # the middle of an even and of an odd axis
    slices = Grid((20, 51), (1.0, 1.0), 32, 1.0).to_slices(planes)[0]
    expected = np.zeros((32, 32))
    expected[15:17, 15:17] = 0.5
    np.testing.assert_allclose(slices, expected, atol=1e-6)


def test_a_coarser_grid_averages_and_does_not_alias():
    stripes = np.tile([0.0, 1.0], 40)[None].repeat(80, 0)
    slices = Grid((80, 80), (1.0, 1.0), 16, 2.7).to_slices(stripes[None])[0]
    assert np.abs(slices[3:-3, 3:-3] - 0.5).max() < 0.1


@pytest.mark.parametrize("step", [0.4, 1.0, 1.7])
def test_weights_sum_to_1_inside_and_outside_is_zero_or_the_edge(step):
    edge, zero = (matrix(21, 64, step, outside=outside) for outside in ("edge", "zero"))
    np.testing.assert_allclose(edge.sum(1), 1, atol=1e-6)
    assert np.isclose(zero.sum(1), 1).sum() >= min(64, int(18 / step))
    if step == 1.7:  # the first target lies 43 pixels outside
        assert zero[0].sum() == 0
        assert edge[0, 0] == pytest.approx(1)


def test_labels_are_resampled_smoothly_where_nearest_frays_the_edge():
    grid = Grid((24, 24), (3.0, 3.0), 64, 1.0)
    x, fine = in_mm(24, 3.0), in_mm(64, 1.0)
    truth = np.hypot(fine[:, None], fine) < 20
    labels = np.uint8(2 * (np.hypot(x[:, None], x) < 20))
    found = grid.labels_to_slices(labels[None])[0]
    assert set(np.unique(found)) == {0, 2}
    nearest = labels[np.ix_(*[np.rint(fine / 3 + 11.5).astype(int).clip(0, 23)] * 2)] == 2
    assert ((found == 2) != truth).sum() < 0.7 * (nearest != truth).sum()


def test_a_tie_of_regions_with_background_is_background_and_shares_decide():
    shares = np.array([[0.5, 0.4, 0.2, 0.0], [0.0, 0.3, 0.5, 0.1], [0.0, 0.2, 0.2, 0.7]])
    assert most_likely(shares).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------ intensities


@pytest.mark.parametrize("dtype", [np.int16, np.float64, np.float32])
@pytest.mark.parametrize("scale", [1, 200])
def test_intensities_lie_in_0_to_1_whatever_the_scanner_stores(dtype, scale):
    image, _ = heart((40, 36, 2, 4), 0, 2)
    image = (scale * (image + 50)).astype(dtype)
    image[3, 3, 0, 0] = 30_000  # a bright voxel does not set the scale
    slices = cache_module.standardise(image, Grid((40, 36), (1.4, 1.4), 32, 1.4))
    assert slices.dtype == np.float16
    assert slices.shape == (8, 32, 32)
    assert slices.min() == 0
    assert slices.max() == 1
    assert 0.2 < slices.mean() < 0.8


def test_slices_lie_frame_after_frame():
    image = np.zeros((16, 16, 2, 3), np.float32)
    image += 10 * np.arange(3) + np.arange(2)[:, None]  # 10 t + z
    slices = cache_module.standardise(image, Grid((16, 16), (1.0, 1.0), 16, 1.0))[:, 8, 8]
    assert (np.diff(slices.astype(float)) > 0).all()  # row = frame * slices + slice


# ------------------------------------------------------------ building and rebuilding


def asked(data, folder, **words):
    words = {"size": 32, "spacing": 2.0, "workers": 1, **words}
    return Settings(data=data, out=folder / "out", cache=folder / "cache", **words)


@pytest.fixture
def data(tmp_path):
    return write_mms(tmp_path / "MnM", MMS_CASES[:3])


def reason(capsys):
    """Why the cache was built, or None."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "building" in line]
    return lines[0].rpartition("MnM.h5: ")[2] if lines else None


def test_every_frame_is_cached_and_labels_of_ed_and_es_alone(data, tmp_path):
    cache = open_cache(asked(data, tmp_path))
    with h5py.File(cache.path) as file:
        assert file["images"].shape == (3 * 3 * 5, 32, 32)
        assert file["images"].dtype == np.float16
        assert file["labels"].shape == (2 * 2 * 3, 32, 32)
        assert file["labels"].dtype == np.uint8
        for case, tiny in zip(cache.cases, MMS_CASES):
            assert (case.code, case.labelled) == (tiny.code, tiny.labelled)
            if not tiny.labelled:
                continue
            experts = np.asarray(nib.load(case.labels[0]).dataobj)
            for frame in (case.ed, case.es):  # ED first, also where it is the last frame of the cine
                expected = case.grid(cache).labels_to_slices(experts[..., frame].transpose(2, 0, 1))
                np.testing.assert_array_equal(file["labels"][case.label_rows(frame)], expected)
                assert set(np.unique(expected)) == {0, 1, 2, 3}


def test_images_and_labels_lie_on_each_other(data, tmp_path):
    cache = open_cache(asked(data, tmp_path))
    case = cache.cases[1]
    with h5py.File(cache.path) as file:
        image, labels = file["images"][case.rows(case.es)], file["labels"][case.label_rows(case.es)]
    assert image[labels == 1].mean() > image[labels == 2].mean() + 0.3  # blood is bright, muscle dark


def test_labels_of_acdc_are_turned_into_the_order_of_mms(tmp_path):
    mms = write_mms(tmp_path / "MnM", [Tiny("A0A0A0", ed=0, es=2)])
    acdc = write_acdc(tmp_path / "acdc", training=1, testing=0)
    labels = []
    for root in (mms, acdc):
        cache = open_cache(asked(root, tmp_path))
        with h5py.File(cache.path) as file:
            labels.append(file["labels"][:])
    areas = [[(each == label).sum() for label in (1, 2, 3)] for each in labels]
    np.testing.assert_allclose(*areas, rtol=0.1)  # other random shift, same rings


def test_a_cache_that_fits_is_not_built_again(data, tmp_path, capsys, monkeypatch):
    first = open_cache(asked(data, tmp_path))
    assert reason(capsys) == "there is none yet"
    monkeypatch.setattr(cache_module, "load_case", lambda case: pytest.fail("voxels read again"))
    assert open_cache(asked(data, tmp_path)) == first
    assert reason(capsys) is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"size": 48}, "size differs: 32 there, 48 asked for"),
        ({"spacing": 1.5}, "spacing differs: 2.0 there, 1.5 asked for"),
    ],
)
def test_another_grid_rebuilds_and_names_the_field(data, tmp_path, capsys, words, named):
    open_cache(asked(data, tmp_path))
    capsys.readouterr()
    cache = open_cache(asked(data, tmp_path, **words))
    assert named in reason(capsys)
    with h5py.File(cache.path) as file:
        assert file["images"].shape[1:] == (cache.size, cache.size)


def touch(data):
    path = data / "Training/Labeled/A0A0A0/A0A0A0_sa.nii.gz"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return "A0A0A0_sa.nii.gz"


def edit_table(data):
    rows = list(csv.reader((data / TABLE).read_text("utf-8-sig").splitlines()))
    row = next(row for row in rows if "B0B0B0" in row)
    row[rows[0].index("Vendor")], row[rows[0].index("VendorName")] = "A", "Siemens"
    with open(data / TABLE, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return "Training/B0B0B0"


def remove_case(data):
    rows = (data / TABLE).read_text().splitlines(keepends=True)
    (data / TABLE).write_text("".join(row for row in rows if "C0C0C0" not in row))
    for path in (data / "Training/Unlabeled/C0C0C0").iterdir():
        path.unlink()
    (data / "Training/Unlabeled/C0C0C0").rmdir()
    return "C0C0C0"


@pytest.mark.parametrize("change", [touch, edit_table, remove_case])
def test_changed_sources_rebuild_and_are_named(data, tmp_path, capsys, change):
    open_cache(asked(data, tmp_path))
    capsys.readouterr()
    name = change(data)
    open_cache(asked(data, tmp_path))
    found = reason(capsys)
    assert found.startswith("sources differ")
    assert name in found


@pytest.mark.parametrize("damage", ["schema", "truncated", "text", "attribute", "dataset"])
def test_an_older_or_damaged_file_is_rebuilt(data, tmp_path, capsys, damage):
    cache = open_cache(asked(data, tmp_path))
    with h5py.File(cache.path) as file:
        expected = file["images"][:]
    if damage == "schema":
        with h5py.File(cache.path, "a") as file:
            file.attrs["schema"] = 0
    elif damage == "attribute":
        with h5py.File(cache.path, "a") as file:
            del file.attrs["size"]
    elif damage == "dataset":
        with h5py.File(cache.path, "a") as file:
            del file["sources"]
    elif damage == "truncated":
        os.truncate(cache.path, 5000)
    else:
        cache.path.write_text("no HDF5")
    capsys.readouterr()
    open_cache(asked(data, tmp_path))
    expected_reason = {"schema": "schema differs: 0 there", "attribute": "size differs: None there"}
    assert reason(capsys).startswith(expected_reason.get(damage, "the file there is not readable"))
    with h5py.File(cache.path) as file:
        np.testing.assert_array_equal(file["images"][:], expected)


def test_two_processes_write_the_same_arrays_as_one(data, tmp_path):
    contents = []
    for workers in (1, 2):
        cache = open_cache(asked(data, tmp_path / str(workers), workers=workers))
        with h5py.File(cache.path) as file:
            contents.append({name: file[name][()] for name in ("images", "labels", "cases")})
    for name in contents[0]:
        np.testing.assert_array_equal(contents[0][name], contents[1][name])
    assert not [child for child in multiprocessing.active_children() if "ForkServerProcess" in child.name]


def spoil(data, code="B0B0B0"):
    image, _ = heart((40, 36, 3, 5), 0, 2)
    image = image.astype(np.float64)
    image[5, 5, 1, 3] = np.nan
    write_nifti(data / f"Training/Labeled/{code}/{code}_sa.nii.gz", image, SPACING)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_voxel_names_the_case_and_leaves_no_cache(data, tmp_path, workers):
    spoil(data)
    with pytest.raises(InputError, match=r"B0B0B0.*NaN"):
        open_cache(asked(data, tmp_path, workers=workers))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".MnM.h5.lock", ".MnM.h5.parts"}


def test_a_bad_voxel_leaves_an_older_cache_as_it_was(data, tmp_path):
    cache = open_cache(asked(data, tmp_path))
    before = cache.path.read_bytes()
    spoil(data)
    with pytest.raises(InputError):
        open_cache(asked(data, tmp_path))
    assert cache.path.read_bytes() == before


def test_skip_bad_goes_on_without_the_case_and_says_so(data, tmp_path, capsys):
    spoil(data)
    for _ in range(2):  # built, then found
        cache = open_cache(asked(data, tmp_path, skip_bad=True))
        assert [case.code for case in cache.cases] == ["A0A0A0", "C0C0C0"]
        assert any("skipped: B0B0B0" in line for line in capsys.readouterr().out.splitlines())
    images, last = np.zeros((15, 32, 32), np.float16), cache.cases[1]
    cache.read("images", [(last.first, last.first + 15)], images)  # no hole where the other would have been
    assert images.std() > 0.1
    with pytest.raises(InputError, match="B0B0B0"):
        open_cache(asked(data, tmp_path))


def test_labelled_pixels_outside_the_crop_are_counted_and_warned_of(data, tmp_path, capsys):
    cache = open_cache(asked(data, tmp_path, size=16, spacing=1.0))
    out = capsys.readouterr().out
    assert "warning: labelled pixels outside the crop" in out
    case = cache.cases[0]
    experts = np.asarray(nib.load(case.labels[0]).dataobj)[..., [case.ed, case.es]] > 0
    x, y = (np.abs(in_mm(n, s)) <= 8 for n, s in zip(case.shape[:2], case.spacing))
    assert case.cropped == pytest.approx(1 - experts[x][:, y].sum() / experts.sum())
    assert open_cache(asked(data, tmp_path, size=48)).cases[0].cropped == 0


def test_a_cache_can_be_handed_to_another_process(data, tmp_path):
    cache = open_cache(asked(data, tmp_path))
    assert pickle.loads(pickle.dumps(cache)) == cache


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(20, 60), st.integers(20, 60), st.integers(1, 3), st.integers(3, 6)),
    st.tuples(st.floats(0.8, 2.0), st.floats(0.8, 2.0), st.just(9.0)),
    st.sampled_from([16, 32, 64]),
    st.floats(0.8, 2.5),
    st.sampled_from(["centre", "motion"]),
    st.data(),
)
def test_what_is_read_from_the_cache_is_the_case_on_its_slices(
    tmp_path_factory, shape, spacing, size, target, crop, data
):
    ed, es = data.draw(st.permutations(range(shape[3])))[:2]
    root = tmp_path_factory.mktemp("drawn")
    tiny = Tiny("A0", ed=ed, es=es)
    write_mms(root / "MnM", [tiny, Tiny("B0", "Training/Unlabeled")], shape, spacing)
    cache = open_cache(asked(root / "MnM", root, size=size, spacing=target, crop=crop))
    for case in cache.cases:
        image, labels, _ = load_case(case)
        slices, grid = to_slices(image, case.spacing, size, target, crop)
        assert case.grid(cache) == dataclasses.replace(grid, centre=grid.centre and list(grid.centre))
        found = np.zeros((case.slices * case.frames, size, size), np.float16)
        cache.read("images", [(case.first, case.first + len(found))], found)
        np.testing.assert_array_equal(found, slices)
        for frame in case.expert:
            rows = case.label_rows(frame)
            found = np.zeros((case.slices, size, size), np.uint8)
            cache.read("labels", [(rows[0], rows[-1] + 1)], found)
            np.testing.assert_array_equal(found, grid.labels_to_slices(labels[frame].transpose(2, 0, 1)))
    assert {case.code: case.expert for case in cache.cases} == {"A0": (ed, es), "B0": ()}


# ------------------------------------------------------------ splits


def cached(code, split, vendor="A", labelled=True):
    known = {name.name: None for name in dataclasses.fields(CachedCase)}
    known.update(code=code, split=split, vendor=vendor, first_label=0 if labelled else None, withheld=())
    return CachedCase(**known)


def split(*cases, seed=0):
    training, validation, unseen = Cache(None, "root", "x", 32, 1.0, cases).training_and_validation(seed)
    return [[case.code for case in part] for part in (training, validation, unseen)]


def test_validation_looks_at_vendors_with_training_labels_alone():
    cases = [cached("T1", "Training"), cached("T2", "Training", "B"), cached("U", "Training", "C", False)]
    cases += [cached(f"V{vendor}", "Validation", vendor) for vendor in "ABCD"]
    cases += [cached("X", "Testing", "A"), cached("N", "Validation", "A", labelled=False)]
    assert split(*cases) == [["T1", "T2", "U"], ["VA", "VB"], ["VC", "VD"]]


@pytest.mark.parametrize(("patients", "held_out"), [(2, 1), (4, 1), (9, 1), (10, 2), (50, 10)])
def test_without_validation_a_fifth_of_the_labelled_patients_is_held_out(patients, held_out, capsys):
    cases = [cached(f"T{k}", "Training") for k in range(patients)] + [cached("U", "Training", "C", False)]
    training, validation, unseen = split(*cases)
    assert len(validation) == held_out
    assert sorted(training + validation) == sorted(case.code for case in cases)
    assert "U" in training
    assert not unseen
    assert f"{held_out} of {patients} training patients are held out" in capsys.readouterr().out


def test_the_held_out_depend_on_the_seed_alone():
    cases = [cached(f"T{k}", "Training") for k in range(20)]
    assert split(*cases, seed=3) == split(*cases, seed=3)
    assert len({tuple(split(*cases, seed=seed)[1]) for seed in range(5)}) > 1


def test_validation_of_unseen_vendors_alone_decides_nothing():
    training, validation, unseen = split(
        cached("T1", "Training"), cached("T2", "Training"), cached("VC", "Validation", "C")
    )
    assert len(training) == len(validation) == 1
    assert unseen == ["VC"]


def test_one_patient_is_trained_and_validated_on_with_a_warning(capsys):
    assert split(cached("T1", "Training"), cached("U", "Training", "C", False)) == [["T1", "U"], ["T1"], []]
    assert "warning" in capsys.readouterr().out


def test_without_training_labels_there_is_nothing_to_learn():
    with pytest.raises(InputError, match="no case of Training has labels"):
        split(cached("U", "Training", "C", False), cached("V", "Validation"))


# ------------------------------------------------------------ where the heart is


def beating(centre, shape=(96, 80), spacing=(1.5, 2.0), frames=6):
    """A disc (X, Y, 1, T) that beats about `centre` (pixels), in a body that does not move."""
    x, y = (in_mm(n, s, c) for n, s, c in zip(shape, spacing, centre))
    distance = np.hypot(x[:, None], y)
    radius = 22 + 6 * np.cos(2 * np.pi * np.arange(frames) / frames)
    body = 0.3 + 0.5 * (np.indices(shape).sum(0) % 17 == 0)
    return np.where(distance[..., None] < radius, 1.0, body[..., None])[:, :, None]


@pytest.mark.parametrize("centre", [(30, 50), (60, 28), (47.5, 39.5)])
def test_the_crop_follows_what_moves_and_not_the_image(centre):
    found = cache_module.motion_centre(beating(centre), (1.5, 2.0, 8.0))
    assert found == pytest.approx(centre, abs=1.5)
    slices, grid = cache_module.to_slices(beating(centre), (1.5, 2.0, 8.0), 32, 1.5, "motion")
    assert grid.centre == found
    x, y = np.indices((32, 32)) - 15.5
    assert (slices[:, np.hypot(x, y) < 9] > 0.9).all(), "the disc lies in the middle of the slices"
    _, centred = cache_module.to_slices(beating(centre), (1.5, 2.0, 8.0), 32, 1.5, "centre")
    assert centred.centre is None


def test_where_nothing_moves_the_crop_is_about_the_image_centre():
    still = beating((30, 50))[..., :1]
    assert cache_module.motion_centre(still, (1.5, 2.0, 8.0)) == (47.5, 39.5)

"""The slice cache: what it holds, when it is rebuilt and why, and how cases are split."""

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

from cardiac import building
from cardiac.cache import Cache, CachedCase, open_cache
from cardiac.cases import load_case
from cardiac.files import InputError
from cardiac.preprocessing import cine_to_slices
from cardiac.run import training_digest
from cardiac.settings import Settings

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


def test_a_label_mended_in_a_file_of_the_same_size_is_another_case_and_a_copy_is_not(data, tmp_path):
    folder = data / MMS_CASES[0].folder / "A0A0A0"
    packed, plain = (folder / f"A0A0A0_sa_gt.nii{suffix}" for suffix in (".gz", ""))
    labels, header = np.asarray(nib.load(packed).dataobj), nib.load(packed).header
    corrected = labels.copy()
    corrected[18:22, 18, 1, 0] = 3
    packed.unlink()
    found = []
    for written in (labels, labels, corrected):
        nib.save(nib.Nifti1Image(written, None, header), plain)
        cases = open_cache(asked(data, tmp_path)).cases
        found.append((plain.stat().st_size, training_digest(cases)))
    assert found[0] == found[1]
    assert found[1][0] == found[2][0]
    assert found[1][1] != found[2][1]


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
            for frame in (case.ed, case.es):  # ED first, even if it is the last frame of the cine
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
    monkeypatch.setattr(building, "load_case", lambda case: pytest.fail("voxels read again"))
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
    for _ in range(2):  # built, then reused
        cache = open_cache(asked(data, tmp_path, skip_bad=True))
        assert [case.code for case in cache.cases] == ["A0A0A0", "C0C0C0"]
        assert any("skipped: B0B0B0" in line for line in capsys.readouterr().out.splitlines())
    images, last = np.zeros((15, 32, 32), np.float16), cache.cases[1]
    cache.file.read("images", [(last.first, last.first + 15)], images)  # no gap where the bad case was
    assert images.std() > 0.1
    with pytest.raises(InputError, match="B0B0B0"):
        open_cache(asked(data, tmp_path))


def test_what_is_said_of_skipped_cases_has_its_place_however_long_it_is(data, tmp_path, monkeypatch):
    expected, load = open_cache(asked(data, tmp_path / "whole")).path, building.load_case

    def refuse(case):
        if case.code == "A0A0A0":
            return load(case)
        raise InputError("\N{ANATOMICAL HEART}" * 2000)  # twelve bytes each as JSON, the maximum

    monkeypatch.setattr(building, "load_case", refuse)
    cache = open_cache(asked(data, tmp_path, skip_bad=True))
    assert [len(problem) for problem in cache.skipped] == [building.LONGEST_PROBLEM] * 2
    with h5py.File(cache.path) as file, h5py.File(expected) as whole:
        np.testing.assert_array_equal(file["images"][:15], whole["images"][:15])
        assert file.attrs["size"] == 32


@pytest.mark.parametrize("frames", [4, 6, 9])
def test_a_case_that_changes_while_it_is_read_touches_no_other(data, tmp_path, monkeypatch, frames):
    load = building.load_case

    def exchanged(case):
        image, labels, warnings = load(case)
        if case.code == "C0C0C0":  # the last
            image = np.concatenate([image] * 2, -1)[..., :frames]
        return image, labels, warnings

    monkeypatch.setattr(building, "load_case", exchanged)
    with pytest.raises(InputError, match="C0C0C0.*changed while it was read"):
        open_cache(asked(data, tmp_path))
    monkeypatch.setattr(building, "load_case", load)
    cache, whole = open_cache(asked(data, tmp_path)), open_cache(asked(data, tmp_path / "whole"))
    assert cache.path.read_bytes() == whole.path.read_bytes()


def test_a_case_that_could_not_be_read_for_a_while_is_read_again(data, tmp_path, monkeypatch):
    def fail(case):
        raise InputError(f"{case.code}: Input/output error")

    load = building.load_case
    monkeypatch.setattr(building, "load_case", fail)
    with pytest.raises(InputError, match="Input/output"):
        open_cache(asked(data, tmp_path))
    monkeypatch.setattr(building, "load_case", load)
    assert len(open_cache(asked(data, tmp_path)).cases) == 3


def test_a_case_that_was_skipped_for_what_has_passed_is_no_longer(data, tmp_path, monkeypatch, capsys):
    load = building.load_case

    def fail(case):
        if case.code == "B0B0B0":
            raise InputError("B0B0B0: Input/output error")
        return load(case)

    monkeypatch.setattr(building, "load_case", fail)
    assert len(open_cache(asked(data, tmp_path, skip_bad=True)).cases) == 2
    monkeypatch.setattr(building, "load_case", load)
    assert len(open_cache(asked(data, tmp_path, skip_bad=True)).cases) == 2, "a run keeps the cases it had"
    assert len(open_cache(asked(data, tmp_path)).cases) == 3
    assert "B0B0B0 can be read again" in capsys.readouterr().out


def test_labelled_pixels_outside_the_crop_are_counted_and_warned_of(data, tmp_path, capsys):
    cache = open_cache(asked(data, tmp_path, size=16, spacing=1.0))
    out = capsys.readouterr().out
    assert "warning: labelled pixels outside the crop" in out
    case = cache.cases[0]
    experts = np.asarray(nib.load(case.labels[0]).dataobj)[..., [case.ed, case.es]] > 0
    x, y = (np.abs(np.arange(n) - (n - 1) / 2) * s <= 8 for n, s in zip(case.shape[:2], case.spacing))
    assert case.cropped == pytest.approx(1 - experts[x][:, y].sum() / experts.sum())
    assert open_cache(asked(data, tmp_path, size=48)).cases[0].cropped == 0


def test_a_cache_can_be_handed_to_another_process(data, tmp_path):
    cache = open_cache(asked(data, tmp_path))
    handed = pickle.loads(pickle.dumps(cache))
    assert handed == cache
    np.testing.assert_array_equal(first_slices(handed), first_slices(cache))


def first_slices(cache):
    found = np.zeros((3, cache.size, cache.size), np.float16)
    cache.file.read("images", [(0, 3)], found)
    return found


@pytest.mark.parametrize("other", [{"size": 48}, {"crop": "motion"}])
def test_a_run_keeps_its_slices_when_another_builds_other_ones(data, tmp_path, other):
    cache = open_cache(asked(data, tmp_path))
    before, pickled = first_slices(cache), pickle.dumps(cache)
    later = open_cache(asked(data, tmp_path, **other))
    assert later.path == cache.path
    assert not np.array_equal(first_slices(later), before)
    np.testing.assert_array_equal(first_slices(cache), before)
    with pytest.raises(InputError, match="MnM.h5: another run has just rebuilt it"):
        pickle.loads(pickled)


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
        slices, grid = cine_to_slices(image, case.spacing, size, target, crop)
        assert case.grid(cache) == dataclasses.replace(grid, centre=grid.centre and list(grid.centre))
        found = np.zeros((case.slices * case.frames, size, size), np.float16)
        cache.file.read("images", [(case.first, case.first + len(found))], found)
        np.testing.assert_array_equal(found, slices)
        for frame in case.expert:
            rows = case.label_rows(frame)
            found = np.zeros((case.slices, size, size), np.uint8)
            cache.file.read("labels", [(rows[0], rows[-1] + 1)], found)
            np.testing.assert_array_equal(found, grid.labels_to_slices(labels[frame].transpose(2, 0, 1)))
    assert {case.code: case.expert for case in cache.cases} == {"A0": (ed, es), "B0": ()}


# ------------------------------------------------------------ splits


def cached(code, split, vendor="A", labelled=True):
    known = {name.name: None for name in dataclasses.fields(CachedCase)}
    known.update(code=code, split=split, vendor=vendor, first_label=0 if labelled else None, withheld=())
    return CachedCase(**known)


def split(*cases, seed=0, held_out=None):
    cache = Cache(None, "root", "x", 32, 1.0, cases)
    training, validation, unseen = cache.training_and_validation(seed, held_out)
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
    assert f"held out for validation: {held_out} of {patients} training patients" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(8))
def test_no_vendors_last_patient_is_held_out(seed):
    """Otherwise the checkpoint would be chosen by a vendor without training labels."""
    cases = [cached(f"A{k}", "Training") for k in range(8)] + [cached("B", "Training", "B")]
    cases += [cached(f"C{k}", "Training", "C") for k in range(2)]
    training, validation, _ = split(*cases, seed=seed)
    assert len(validation) == 2
    assert {code[0] for code in training} == set("ABC")


def test_the_held_out_depend_on_the_seed_alone():
    cases = [cached(f"T{k}", "Training") for k in range(20)]
    assert split(*cases, seed=3) == split(*cases, seed=3)
    assert len({tuple(split(*cases, seed=seed)[1]) for seed in range(5)}) > 1


def test_who_was_held_out_stays_held_out_when_a_validation_comes(capsys):
    patients = [cached(f"T{k}", "Training") for k in range(9)]
    came = [cached("VA", "Validation"), cached("VC", "Validation", "C")]
    before = split(*patients)
    assert split(*patients, *came, held_out=before[1]) == [*before[:2], ["VC"]]
    assert split(*patients, *came, held_out=[]) == split(*patients, *came), "none were held out"
    with pytest.raises(InputError, match="validated on cases of Validation, which are now missing"):
        split(*patients, held_out=[])
    with pytest.raises(InputError, match="--held-out VA: not a labelled case of Training"):
        split(*patients, *came, held_out=["T1", "VA"])
    hidden = dataclasses.replace(patients[0], withheld=(None,))
    with pytest.raises(InputError, match="--held-out T0: --labelled-cases withholds its labels"):
        split(hidden, *patients[1:], held_out=["T0", "T1"])


def test_validation_of_unseen_vendors_alone_decides_nothing():
    training, validation, unseen = split(
        cached("T1", "Training"), cached("T2", "Training"), cached("VC", "Validation", "C")
    )
    assert len(training) == len(validation) == 1
    assert unseen == ["VC"]


def test_one_patient_is_trained_and_validated_on_with_a_warning(capsys):
    assert split(cached("T1", "Training"), cached("U", "Training", "C", False)) == [["T1", "U"], ["T1"], []]
    assert "warning" in capsys.readouterr().out
    assert split(cached("T1", "Training"), held_out=["T1"]) == [["T1"], ["T1"], []], "also if resumed"


def test_without_training_labels_there_is_nothing_to_learn():
    with pytest.raises(InputError, match="no case of Training has labels"):
        split(cached("U", "Training", "C", False), cached("V", "Validation"))

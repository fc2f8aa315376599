"""The readers: valid datasets are read correctly, and every fault is one line that names its place."""

import gzip
import shutil
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from datasets import MMS_CASES, SPACING, TABLE, Tiny, heart, write_acdc, write_mms, write_nifti, write_table

from cardiac import nifti
from cardiac.cases import load_case, refusal
from cardiac.check import main as check
from cardiac.files import InputError
from cardiac.layouts import read_cases

CODE = "A0A0A0"  # the case that faults are put into
CASES = [case for case in MMS_CASES if case.code in (CODE, "B0B0B0", "C0C0C0", "D1A1A1", "E1A1A1")]


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    return write_mms(tmp_path_factory.mktemp("valid") / "MnM", CASES)


@pytest.fixture
def mms(valid, tmp_path):
    return shutil.copytree(valid, tmp_path / "MnM")


def files(root):
    folder = root / "Training" / "Labeled" / CODE
    return folder / f"{CODE}_sa.nii.gz", folder / f"{CODE}_sa_gt.nii.gz"


def edit_table(root, old, new):
    table = root / TABLE
    text = table.read_text(encoding="utf-8-sig")
    assert old in text
    table.write_text(text.replace(old, new, 1))


def edit_header(path, offset, code, *values):
    """Write values of this struct code at a byte offset of the header."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{len(values)}{code}", data, offset, *values)
    path.write_bytes(gzip.compress(bytes(data)))


def edit_voxels(path, change, dtype=None):
    voxels = np.asarray(nib.load(path).dataobj)
    voxels = voxels if dtype is None else voxels.astype(dtype)
    changed = change(voxels)
    write_nifti(path, voxels if changed is None else changed)


def put(path, index, value, dtype=None):
    def change(voxels):
        voxels[index] = value

    edit_voxels(path, change, dtype)


def line(ed=0, es=2, code=CODE, vendor="A", name="Siemens", centre=1):
    return f"0,{code},{name},{vendor},{centre},{ed},{es}"


def replace_line(**values):
    return lambda root: edit_table(root, line(), line(**values))


def forget_unlabelled(root):
    shutil.rmtree(root / "Training" / "Unlabeled")
    edit_table(root, "C0C0C0,GE,C,3,0,0", "C0C0C0,GE,C,3,nan,0.0")


def move_labels(root):
    edit_voxels(files(root)[1], lambda v: np.roll(v, 1, axis=3))


# (name, what to do to the dataset, what the message must contain besides the case's code)
HEADER_FAULTS = [
    ("no image", lambda r: files(r)[0].unlink(), f"{CODE}_sa.nii.gz: no such file"),
    ("no label", lambda r: files(r)[1].unlink(), f"{CODE}_sa_gt.nii.gz: no such file"),
    ("no row", lambda r: edit_table(r, line() + "\n", ""), "no row"),
    ("no folder", lambda r: shutil.rmtree(files(r)[0].parent), "no such folder (line 2"),
    ("two rows", lambda r: edit_table(r, line(), line() + "\n" + line()), "duplicate code, lines 2 and 3"),
    ("two splits", lambda r: shutil.copytree(files(r)[0].parent, r / "Testing" / CODE), "duplicate case"),
    ("ED out of range", replace_line(ed=5), "ED is '5', not a frame from 0 to 4"),
    ("ED negative", replace_line(ed=-1), "ED is '-1'"),
    ("ES text", replace_line(es="late"), "ES is 'late'"),
    ("ES empty", replace_line(es=""), "ES is empty"),
    ("ES NaN", replace_line(es="nan"), "ES is 'nan'"),
    ("ED fraction", replace_line(ed="0.5"), "ED is '0.5'"),
    ("ED is ES", replace_line(es=0), "ED and ES are the same frame, 0"),
    ("vendor unknown", replace_line(vendor="E"), "Vendor is 'E'"),
    ("vendor empty", replace_line(vendor="", name=""), "Vendor is ''"),
    ("centre hostile", replace_line(centre="<b>"), "Centre '<b>'"),
    ("image empty file", lambda r: files(r)[0].write_bytes(b""), "not readable as NIfTI"),
    ("image text", lambda r: files(r)[0].write_bytes(gzip.compress(b"x" * 999)), "not readable as NIfTI"),
    ("image not gzip", lambda r: files(r)[0].write_bytes(b"x" * 999), "not readable as NIfTI"),
    ("image 3-D", lambda r: edit_voxels(files(r)[0], lambda v: v[..., 0]), "3-D (40 x 36 x 3), not 4-D"),
    ("image 5-D", lambda r: edit_header(files(r)[0], 40, "h", 5, 40, 36, 3, 5, 1), "5-D"),
    ("image empty", lambda r: edit_header(files(r)[0], 40, "h", 4, 40, 36, 0, 5), "empty volume"),
    ("image RGB", lambda r: edit_header(files(r)[0], 70, "h", 128, 24), "RGB"),
    ("image complex", lambda r: edit_header(files(r)[0], 70, "h", 32, 64), "complex64"),
    ("terabytes", lambda r: edit_header(files(r)[0], 40, "h", 4, 9999, 9999, 999, 9), "header claims 1,674"),
    ("too large", lambda r: edit_header(files(r)[0], 40, "h", 4, 999, 999, 99, 4), "truncated, or wrong"),
    ("spacing zero", lambda r: edit_header(files(r)[0], 80, "f", 0), "spacing 0 x 1.3 x 9 is not positive"),
    ("spacing negative", lambda r: edit_header(files(r)[0], 84, "f", -1.3), "1.4 x -1.3 x 9 is not positive"),
    ("spacing NaN", lambda r: edit_header(files(r)[0], 88, "f", np.nan), "1.4 x 1.3 x nan is not positive"),
    ("spacing in metres", lambda r: edit_header(files(r)[0], 123, "b", 1), "spacing 1400 x 1300 x 9000 mm"),
    ("affine singular", lambda r: edit_header(files(r)[0], 280, "f", 0, 0, 0, 0), "affine is singular"),
    ("affine NaN", lambda r: edit_header(files(r)[0], 280, "f", np.nan), "affine is singular or not finite"),
    ("label shape", lambda r: edit_voxels(files(r)[1], lambda v: v[:-1]), "labels of shape 39 x 36 x 3 x 5"),
    ("label 3-D", lambda r: edit_voxels(files(r)[1], lambda v: v[..., 0]), "3-D"),
]
VOXEL_FAULTS = [
    ("gzip truncated", lambda r: files(r)[0].write_bytes(files(r)[0].read_bytes()[:-500]), "truncated"),
    ("gzip checksum", lambda r: files(r)[0].write_bytes(files(r)[0].read_bytes()[:-8] + b"8" * 8), "damaged"),
    ("label truncated", lambda r: files(r)[1].write_bytes(files(r)[1].read_bytes()[:-20]), "truncated"),
    ("NaN", lambda r: put(files(r)[0], (3, 3, 1, 1), np.nan, np.float32), "NaN or infinite"),
    ("infinite", lambda r: put(files(r)[0], (3, 3, 1, 1), np.inf, np.float64), "NaN or infinite"),
    ("beyond float32", lambda r: put(files(r)[0], (3, 3, 1, 1), 1e300, np.float64), "NaN or infinite"),
    ("constant", lambda r: put(files(r)[0], ..., 7), "constant image (7 everywhere)"),
    ("constant ED", lambda r: put(files(r)[0], (..., 0), 7), "constant in frame 0, which has labels"),
    ("label 4", lambda r: put(files(r)[1], (3, 3, 1, 0), 4), "unknown label 4;"),
    ("label 255", lambda r: put(files(r)[1], (3, 3, 1, 0), 255), "unknown label 255;"),
    ("label -1", lambda r: put(files(r)[1], (3, 3, 1, 0), -1, np.int16), "unknown label -1;"),
    ("label 0.5", lambda r: put(files(r)[1], (3, 3, 1, 0), 0.5, np.float32), "unknown label 0.5;"),
    ("label 256", lambda r: put(files(r)[1], (3, 3, 1, 0), 256, np.int16), "unknown label 256;"),
    ("label NaN", lambda r: put(files(r)[1], (3, 3, 1, 0), np.nan, np.float32), "unknown label nan;"),
    ("labels empty", lambda r: put(files(r)[1], ..., 0), "empty at ED and ES: labels in no frame"),
    ("labels empty at ES", lambda r: put(files(r)[1], (..., 2), 0), "empty at ES: labels in frame 0"),
    ("labels moved", move_labels, "empty at ED and ES: labels in frame 1, 3"),
    ("label in a third frame", lambda r: put(files(r)[1], (3, 3, 1, 4), 2), "label in the wrong frame: "),
]
DATASET_FAULTS = [
    ("no folder", shutil.rmtree, "no such folder"),
    ("no splits", lambda r: [shutil.rmtree(p) for p in r.iterdir() if p.is_dir()], "no folder Training"),
    ("no CSV", lambda r: (r / TABLE).unlink(), "no table *opendataset.csv"),
    ("two CSVs", lambda r: shutil.copy(r / TABLE, r / "old_OpenDataset.csv"), "2 files match *opendataset"),
    ("CSV is a folder", lambda r: [(r / TABLE).unlink(), (r / TABLE).mkdir()], "not readable as CSV"),
    ("CSV empty", lambda r: (r / TABLE).write_text(""), "no column External code"),
    ("no ED", lambda r: edit_table(r, ",ED,", ",Ed.,"), "no column ED; the first line is"),
    ("no code", lambda r: edit_table(r, "External", "Internal"), "no column External code"),
    ("no vendor", lambda r: edit_table(r, "VendorName,Vendor", "V,W"), "no column Vendor or VendorName"),
]


def ids(faults):
    return [fault[0] for fault in faults]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "spoil", "says"), HEADER_FAULTS, ids=ids(HEADER_FAULTS))
def test_header_fault(mms, name, spoil, says):
    assert len(read_cases(mms).good()) == 5  # the same dataset without the fault
    spoil(mms)
    dataset = read_cases(mms)
    assert len(dataset.problems) == 1
    assert dataset.problems[0].startswith(CODE)
    with pytest.raises(InputError) as error:
        dataset.good()
    assert says in one_line(error)
    assert "cardiac.check" in one_line(error)
    assert {case.code for case in dataset.good(skip_bad=True)} == {case.code for case in CASES} - {CODE}


@pytest.mark.parametrize(("name", "spoil", "says"), VOXEL_FAULTS, ids=ids(VOXEL_FAULTS))
def test_voxel_fault(mms, name, spoil, says):
    case = next(case for case in read_cases(mms).good() if case.code == CODE)
    load_case(case)
    spoil(mms)
    case = next(case for case in read_cases(mms).good() if case.code == CODE)  # the header is still good
    with pytest.raises(InputError) as error:
        load_case(case)
    assert one_line(error).startswith(f"{CODE}: ")
    assert says in one_line(error)


@pytest.mark.parametrize(("name", "spoil", "says"), DATASET_FAULTS, ids=ids(DATASET_FAULTS))
def test_dataset_fault(mms, capsys, name, spoil, says):
    spoil(mms)
    with pytest.raises(InputError) as error:
        read_cases(mms)
    assert says in one_line(error)
    assert str(mms) in one_line(error)
    assert check(["--data", str(mms)]) == 2
    assert says in capsys.readouterr().err


HOSTILE = ["../x", "a,b", "a'b", 'a"b', "a\nb", "<b>x</b>", "=1+1", ".hidden", "", "é", "x" * 101]


@pytest.mark.parametrize("code", HOSTILE)
def test_hostile_code(mms, code):
    quoted = '"' + code.replace('"', '""') + '"'
    edit_table(mms, line() + "\n", f"{line()}\n{line(code=quoted)}\n")
    with pytest.raises(InputError) as error:
        read_cases(mms).good()
    assert f"{TABLE}: line {4 if chr(10) in code else 3}: External code " in one_line(error)


def test_uncompressed_file_shorter_than_its_header(mms):
    image, _ = files(mms)
    data = gzip.decompress(image.read_bytes())
    image.unlink()
    plain = image.with_suffix("")
    plain.write_bytes(data)
    assert len(read_cases(mms).good()) == 5
    plain.write_bytes(data[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_cases(mms).good()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(replace_line(ed="0.0", es="2.0"), id="frames written as floats"),
        pytest.param(replace_line(vendor="", name="SIEMENS Healthineers"), id="vendor by name"),
        pytest.param(replace_line(vendor="a"), id="vendor in lower case"),
        pytest.param(replace_line(centre=""), id="no centre"),
        pytest.param(lambda r: edit_table(r, ",Vendor,", ",,"), id="no vendor column"),
        pytest.param(lambda r: edit_table(r, line(), line() + ",,,\n,,,,,,"), id="empty and long lines"),
        pytest.param(lambda r: (r / TABLE).rename(r / "201014_OPENDATASET.CSV"), id="table in upper case"),
        pytest.param(lambda r: (r / "._x_opendataset.csv").write_text("x"), id="macOS file"),
        pytest.param(lambda r: (r / "Training/Labeled").rename(r / "Training/LABELED"), id="LABELED"),
        pytest.param(lambda r: (r / "Testing").rename(r / "testing"), id="lower-case split"),
        pytest.param(lambda r: shutil.rmtree(r / "Testing"), id="Testing not downloaded"),
        pytest.param(lambda r: shutil.rmtree(r / "Training/Unlabeled"), id="Unlabeled not downloaded"),
        pytest.param(forget_unlabelled, id="Unlabeled not downloaded, table saved by pandas"),
        pytest.param(lambda r: (r / "Training/Labeled/@eaDir").mkdir(), id="a system's folder"),
        pytest.param(lambda r: edit_header(files(r)[0], 280, "f", -1.3, 0.4, 0.1), id="oblique affine"),
        pytest.param(lambda r: edit_header(files(r)[1], 80, "f", 0), id="spacing of the labels is not used"),
        pytest.param(lambda r: put(files(r)[0], (..., 4), 7), id="constant frame without labels"),
        pytest.param(lambda r: edit_voxels(files(r)[1], lambda v: v, np.float64), id="labels as floats"),
        pytest.param(lambda r: edit_voxels(files(r)[0], lambda v: v, np.float64), id="image float64"),
        pytest.param(lambda r: edit_voxels(files(r)[0], lambda v: v, ">i2"), id="image big-endian"),
    ],
)
def test_good_neighbours(mms, change):
    change(mms)
    dataset = read_cases(mms)
    case = dataset.good()[0]
    assert (case.code, case.vendor, case.ed, case.es) == (CODE, "A", 0, 2)
    assert load_case(case)[1][2].any()


@pytest.mark.parametrize("table", ["in the archive's folder", "beside"])
def test_mms_is_read_right(tmp_path, table):
    write_mms(tmp_path / "MnM" / "OpenDataset")
    if table == "beside":
        (tmp_path / "MnM" / "OpenDataset" / TABLE).rename(tmp_path / "MnM" / TABLE)
    dataset = read_cases(tmp_path / "MnM")
    assert (dataset.name, dataset.kind, dataset.problems) == ("MnM", "M&Ms", ())
    assert dataset.root == tmp_path / "MnM" / "OpenDataset"
    by_code = {case.code: case for case in dataset.good()}
    assert list(by_code) == ["A0A0A0", "B0B0B0", "C0C0C0", "D1A1A1", "D2C2C2", "E1A1A1", "E2D2D2"]
    case, unlabelled = by_code["B0B0B0"], by_code["C0C0C0"]
    assert (case.vendor, case.centre, case.split, case.ed, case.es) == ("B", "2", "Training", 4, 1)
    assert case.shape == (40, 36, 3, 5)
    assert case.spacing == pytest.approx(SPACING)
    folder = "Training/Labeled/B0B0B0/B0B0B0"
    assert case.files == (f"{folder}_sa.nii.gz", f"{folder}_sa_gt.nii.gz")
    image, labels, warnings = load_case(case)
    drawn, truth = heart(case.shape, 4, 1, seed=1)
    assert image.dtype == np.int16, "as stored: half the memory of float32"
    np.testing.assert_array_equal(image, drawn.astype(np.int16))
    assert set(labels) == {4, 1}
    for frame, label in labels.items():
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, truth[..., frame])
    assert warnings == []
    assert (unlabelled.ed, unlabelled.es, unlabelled.labels, unlabelled.split) == (None, None, (), "Training")
    assert load_case(unlabelled)[1] == {}


def test_stored_scale_is_applied(mms):
    edit_header(files(mms)[0], 112, "f", 2.0, -3.0)
    image = load_case(read_cases(mms).good()[0])[0]
    np.testing.assert_array_equal(image, heart((40, 36, 3, 5), 0, 2, 0)[0].astype(np.int16) * 2.0 - 3.0)


def test_swapped_labels_are_a_warning(mms):
    edit_voxels(files(mms)[1], lambda v: np.array([0, 3, 2, 1], np.uint8)[v])
    warnings = load_case(read_cases(mms).good()[0])[2]
    assert len(warnings) == 1
    assert f"{CODE}: LV and RV look swapped" in warnings[0]


@pytest.mark.parametrize("factors", [(-1, 1, 1), (1.1, 1, 1), (1.01, 1, 1), (np.nan, 1, 1)])
def test_labels_that_lie_otherwise_than_their_image_are_a_warning(mms, factors):
    image, labels, *_ = files(mms)
    affine = nib.load(image).affine
    affine[:3, 3] += 5  # another origin by itself gives no warning
    edit_header(labels, 252, "h", 0, 1)  # codes of qform and sform
    edit_header(labels, 280, "f", *(affine * [*factors, 1])[:3].ravel())
    warnings = load_case(read_cases(mms).good()[0])[2]
    assert len(warnings) == (factors != (1.01, 1, 1))
    assert all(f"{CODE}: affines of {labels.name} and its image differ" in line for line in warnings)


def test_row_without_folder_is_fine_only_where_its_split_is_absent(tmp_path):
    write_mms(tmp_path / "a", CASES)
    write_table(tmp_path / "a" / TABLE, [*CASES, Tiny("Z9", "Testing")])
    assert "Z9: no such folder" in read_cases(tmp_path / "a").problems[0]
    shutil.rmtree(tmp_path / "a" / "Testing")
    dataset = read_cases(tmp_path / "a")
    assert dataset.problems == ()
    assert "2 rows" in dataset.warnings[0]


def test_several_datasets_in_one_folder(tmp_path):
    write_mms(tmp_path / "a", CASES[:1])
    write_acdc(tmp_path / "b", 1, 0)
    with pytest.raises(InputError, match="one of its datasets: a, b"):
        read_cases(tmp_path)


def test_acdc_is_read_right(tmp_path):
    write_acdc(tmp_path / "ACDC", ed=1, es=3)
    dataset = read_cases(tmp_path / "ACDC")
    assert dataset.kind == "ACDC"
    found = [(case.code, case.split, case.vendor, case.centre, case.ed, case.es) for case in dataset.good()]
    assert found == [
        ("patient001", "Training", "A", "", 1, 3),
        ("patient002", "Training", "A", "", 1, 3),
        ("patient101", "Testing", "A", "", 1, 3),
    ]
    image, labels, warnings = load_case(dataset.cases[1])
    drawn, truth = heart((40, 36, 3, 5), 1, 3, seed=2)
    np.testing.assert_array_equal(image, drawn.astype(np.int16))
    assert set(labels) == {1, 3}
    for frame, label in labels.items():
        np.testing.assert_array_equal(label, truth[..., frame])
    assert warnings == []
    assert dataset.cases[0].files[1] == "training/patient001/patient001_frame02_gt.nii.gz"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "Info.cfg").unlink(), "Info.cfg: not readable"),
        (lambda f: (f / "Info.cfg").write_text("ED: 1\n"), "Info.cfg: ES is empty"),
        (lambda f: (f / "Info.cfg").write_text("ED: 0\nES: 3\n"), "ED is '0', not a frame from 1 to 5"),
        (lambda f: (f / "Info.cfg").write_text("ED: 1\nES: 6\n"), "ES is '6', not a frame from 1 to 5"),
        (lambda f: (f / "Info.cfg").write_text("ED: 1\nES: 4\n"), "frame04_gt.nii.gz: no such file"),
        (lambda f: (f / "patient001_4d.nii.gz").unlink(), "patient001_4d.nii.gz: no such file"),
        (lambda f: shutil.copy(f / "patient001_4d.nii.gz", f / "patient001_frame01_gt.nii.gz"), "4-D"),
    ],
)
def test_acdc_fault(tmp_path, spoil, says):
    write_acdc(tmp_path, training=2, testing=0)
    spoil(tmp_path / "training" / "patient001")
    with pytest.raises(InputError) as error:
        read_cases(tmp_path).good()
    assert one_line(error).startswith("patient001: ")
    assert says in one_line(error)
    assert [case.code for case in read_cases(tmp_path).good(skip_bad=True)] == ["patient002"]


def test_check_lists_everything_at_once(mms, capsys):
    assert check(["--data", str(mms)]) == 0
    assert "5 good cases, 0 problems" in capsys.readouterr().out
    edit_table(mms, line(), line(ed=99))
    shutil.rmtree(mms / "Testing" / "E1A1A1")
    (mms / "Testing" / "stray").mkdir()
    gt = mms / "Training" / "Labeled" / "B0B0B0" / "B0B0B0_sa_gt.nii.gz"
    put(gt, ..., 0)
    assert check(["--data", str(mms)]) == 2
    out, err = capsys.readouterr()
    problems = [text for text in err.splitlines() if text.startswith("problem: ")]
    assert [text.split(": ")[1] for text in problems] == [CODE, "stray", "E1A1A1", "B0B0B0"]
    assert "2 good cases, 4 problems" in out


def test_check_says_where_nothing_can_be_propagated(tmp_path, capsys):
    write_acdc(tmp_path, shape=(40, 36, 3, 2), es=1)
    assert check(["--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0 frames between ED and ES; ED comes after ES in 0\n" in out
    assert "nothing to propagate to, unless --labelled-phases" in out


def test_check_without_a_good_case(tmp_path, capsys):
    write_mms(tmp_path, CASES[:1])
    files(tmp_path)[0].unlink()
    assert check(["--data", str(tmp_path)]) == 2
    assert "0 good cases, 1 problems" in capsys.readouterr().out
    with pytest.raises(InputError, match="no such file"):
        read_cases(tmp_path).good(skip_bad=True)


def test_a_refusal_names_the_first_problem_and_counts_the_others(tmp_path):
    assert str(refusal(["A: lost"], tmp_path)).startswith("A: lost. `python -m cardiac.check --data ")
    assert str(refusal(["A: lost", "B: torn", "C: empty"], tmp_path)).startswith("A: lost (and 2 more). `")


def spacing_read(path, zooms, unit="mm"):
    """The spacing read from an image of 40 x 30 pixels, one slice and one frame, with these zooms."""
    image = nib.Nifti1Image(np.zeros((40, 30, 1, 1), np.int16), np.eye(4))
    image.header.set_zooms((*zooms, 1))
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, path)
    return nifti.spacing_of(nifti.read_header(path), path)


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_spacing_is_in_mm_whatever_the_header_counts_in(tmp_path, unit, mm):
    zooms = [each / mm for each in (1.5, 2, 8)]
    assert spacing_read(tmp_path / "image.nii", zooms, unit) == pytest.approx((1.5, 2, 8))


@pytest.mark.parametrize("zooms", [(0.02, 2, 8), (1.5, 0.03, 8), (51, 2, 8), (1.5, 67, 8)])
def test_slices_of_less_than_a_mm_or_more_than_two_metres_are_refused(tmp_path, zooms):
    with pytest.raises(InputError, match="fix its header"):
        spacing_read(tmp_path / "image.nii", zooms)


@pytest.mark.parametrize(("frames", "fits"), [(17, True), (18, False)])
def test_what_would_take_more_than_2_gib_as_float32_is_refused(tmp_path, frames, fits):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((1024, 1024, 30, frames))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + np.random.default_rng(0).bytes(600_000)))
    if fits:
        assert nifti.read_header(path).get_data_shape()[3] == frames
    else:
        with pytest.raises(InputError, match="no more than 2 GiB, as float32 or more, are read"):
            nifti.read_header(path)


# ------------------------------------------------------------------------------------- unpacking in pieces

CONTENT = np.random.default_rng(0).integers(0, 99, 5000, np.uint8).tobytes()
PACKED, IN_TWO = gzip.compress(CONTENT), gzip.compress(CONTENT[:999]) + gzip.compress(CONTENT[999:])


@pytest.fixture(params=["zlib", "isal.isal_zlib"])
def either_zlib(request, monkeypatch):
    monkeypatch.setattr(nifti, "inflate", pytest.importorskip(request.param))


@pytest.mark.usefixtures("either_zlib")
@pytest.mark.parametrize("piece", [1, 7, 1000, 2**18])
@pytest.mark.parametrize("size", [5000, 4999, 4990, 1])
@pytest.mark.parametrize("packed", [PACKED, IN_TWO, PACKED + bytes(9), PACKED + b"x"])
def test_what_is_packed_is_unpacked_in_pieces(tmp_path, monkeypatch, piece, size, packed):
    monkeypatch.setattr(nifti, "CHUNK_BYTES", piece)
    (tmp_path / "a.gz").write_bytes(packed)
    assert bytes(nifti._read(tmp_path / "a.gz", size)) == CONTENT[:size]


WRONG_SUM = PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:]


@pytest.mark.usefixtures("either_zlib")
@pytest.mark.parametrize("piece", [7, 2**18])
@pytest.mark.parametrize(
    ("packed", "size"),
    [(PACKED, 5001), (WRONG_SUM, 5000), *((PACKED[:-cut], 5000) for cut in (1, 4, 8, 9, 1000)), (b"", 1)],
)
def test_what_is_cut_or_damaged_is_refused(tmp_path, monkeypatch, piece, packed, size):
    monkeypatch.setattr(nifti, "CHUNK_BYTES", piece)
    (tmp_path / "a.gz").write_bytes(packed)
    with pytest.raises(nifti.UNREADABLE):
        nifti._read(tmp_path / "a.gz", size)


@pytest.mark.usefixtures("either_zlib")
def test_what_expands_beyond_its_claim_is_not_unpacked(tmp_path, monkeypatch):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(2**24)))
    tracemalloc.start()
    try:
        assert bytes(nifti._read(tmp_path / "a.gz", 1000)) == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()

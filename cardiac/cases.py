"""What lies on disk: the cases of an M&Ms or ACDC dataset, checked before anything long is started.

`read_cases` looks at paths, tables and NIfTI headers only, a millisecond a case; `load_case` at the voxels.
What is wrong with a case becomes one line: the case, the file, the fault and, where it helps, what to do.

The datasets differ in three ways, which only `_mms_case` and `_acdc_case` know:

    M&Ms   CODE_sa.nii.gz, one 4-D label file   ED and ES in one table, zero-based     1 LV, 2 MYO, 3 RV
    ACDC   CODE_4d.nii.gz, a 3-D file a frame   ED and ES in Info.cfg, one-based       1 RV, 2 MYO, 3 LV
"""

import collections
import csv
import gzip
import io
import logging
import math
import os
import re
import shlex
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from cardiac import LABELS
from cardiac.files import InputError

SPLITS = ("Training", "Validation", "Testing")
VENDORS = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}

LV, MYO, RV = LABELS.values()
MMS_ORDER, ACDC_ORDER = (0, LV, MYO, RV), (0, RV, MYO, LV)  # our label of each value in their files
UNLABELLED = "training/unlabeled"
MMS_PLACES = ("training/labeled", UNLABELLED, "validation", "testing")  # folders of cases, in any case
ACDC_PLACES = ("training", "testing")

LARGEST = 2 * 2**30  # bytes of one file after decoding; the largest scan of M&Ms takes 1.2 GiB as float64
DEFLATE = 1100  # gzip cannot make anything more than 1032 times smaller
EXTENT_MM = (1, 2000)  # of a slice; outside, the spacing is damaged or in another unit
CODE = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, OverflowError, nib.spatialimages.HeaderDataError)


@dataclass(frozen=True)
class Case:
    """One patient: what is known without reading voxels."""

    code: str  # letters, digits, '.', '_', '-': fit for file names and tables
    vendor: str  # A, B, C or D, see VENDORS
    centre: str  # '' where it is not known
    split: str  # one of SPLITS
    ed: int | None  # frame of end-diastole, zero-based; None without expert labels (Training/Unlabeled)
    es: int | None  # frame of end-systole
    root: Path  # folder of the dataset
    image: Path  # the cine, 4-D NIfTI
    labels: tuple[Path, ...]  # one 4-D file, or the 3-D files of ED and ES; empty without expert labels
    label_order: tuple[int, ...]  # our label of each value in these files
    shape: tuple[int, int, int, int]  # X, Y, slices Z, frames T
    spacing: tuple[float, float, float]  # mm: X, Y, from slice to slice

    @property
    def files(self):
        """All source files as they lie below `root`."""
        return tuple(path.relative_to(self.root).as_posix() for path in (self.image, *self.labels))

    def identity(self):
        """What tells when the case has changed, as JSON: size and time of its files, what the table says."""
        status = {name: os.stat(self.root / name) for name in self.files}
        sources = {name: [each.st_size, each.st_mtime_ns] for name, each in status.items()}
        return {**sources, f"{self.split}/{self.code}": [self.vendor, self.centre, self.ed, self.es]}


@dataclass(frozen=True)
class Dataset:
    root: Path  # the folder that holds Training, Validation, Testing
    name: str  # of the folder that the user gave
    kind: str  # "M&Ms" or "ACDC"
    cases: tuple[Case, ...]  # the good ones, by split, then code
    problems: tuple[str, ...]  # one line each, beginning with the case or table that is left out
    warnings: tuple[str, ...]

    def good(self, skip_bad=False):
        """The good cases; InputError if there are none or, without `skip_bad`, if there are any others."""
        if self.problems and not (skip_bad and self.cases):
            raise refusal(self.problems, self.root)
        return self.cases


def refusal(problems, root):
    """The InputError of a script that will not go on with these problems: the first, and where to see all."""
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InputError(
        f"{problems[0]}{others}. `python -m cardiac.check --data {shlex.quote(str(root))}` lists them all, "
        "--skip-bad goes on without these cases"
    )


def read_cases(root):
    """The `Dataset` in folder `root`, by its headers; InputError where there is none."""
    base = _find_base(Path(root))
    tables = [path for path in _listing(base) if path.name.lower().endswith("opendataset.csv")]
    if len(tables) > 1:
        names = _join(shown(table.name) for table in tables)
        raise _fault(base, f"{len(tables)} files match *opendataset.csv ({names}); keep one of them")
    patients = [pair for pair in _case_folders(base, ACDC_PLACES) if "patient" in pair[1].name.lower()]
    if tables:
        kind, (cases, problems, warnings) = "M&Ms", _read_mms(base, tables[0])
    elif patients:
        kind, (cases, problems), warnings = "ACDC", _read_all(patients, partial(_acdc_case, base)), []
    else:
        what = "no table *opendataset.csv (M&Ms) and no folders training/patient001 (ACDC) in it"
        raise _fault(base, f"{what}; copy the table of the download there")
    if not cases and not problems:
        raise _fault(base, "no folders of cases in it; give --data the folder that holds Training")
    cases = sorted(cases, key=lambda case: (SPLITS.index(case.split), case.code))
    return Dataset(base, Path(root).resolve().name, kind, tuple(cases), tuple(problems), tuple(warnings))


def load_case(case):
    """Read the voxels of a case.

    Returns image (X, Y, Z, T), see `read_image`; labels {frame: uint8 (X, Y, Z)} of ED and ES, in M&Ms
    order, or {}; warnings, a list of lines. Raises InputError, beginning with the code, for voxels that
    cannot be used.
    """
    try:
        image, labels, warnings = read_image(case.image), load_labels(case), []
        flat = [t for t in range(case.shape[3]) if image[..., t].min() == image[..., t].max()]
        if any(t in flat for t in labels):
            raise _fault(case.image, f"constant in frame {_join(flat)}, which has labels; download it again")
    except InputError as fault:
        raise InputError(f"{case.code}: {fault}") from fault
    if flat:
        warnings.append(f"{case.code}: image is constant in frame {_join(flat)}")
    if _looks_swapped(labels.values()):
        warnings.append(f"{case.code}: LV and RV look swapped: the myocardium encloses label 3, not label 1")
    return image, labels, warnings


# --------------------------------------------------------------------------------------------- NIfTI files


def read_header(path, dimensions=(4,)):
    """nibabel's header of a NIfTI file, of which no more than the first 540 bytes are read.

    Raises InputError unless the voxels are real numbers, in one of these numbers of dimensions, and as many
    as the file can hold: a header may claim terabytes, and nothing is allocated before this check.
    """
    try:
        with _open(path) as file:
            start = file.read(540)
        kind = nib.Nifti2Header if nib.Nifti2Header.may_contain_header(start) else nib.Nifti1Header
        if not kind.may_contain_header(start):
            raise ValueError("no NIfTI header in it")
        header = kind(start[: kind.sizeof_hdr], check=False)
        spacing = header["pixdim"][1:].copy()
        header.check_fix(logging.Logger("silent", logging.CRITICAL + 1), error_level=40)
        header["pixdim"][1:] = spacing  # check_fix makes 1 of 0 and drops signs, which `spacing_of` is to see
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
        if header["magic"].item() != header.single_magic or offset < header.single_vox_offset:
            raise ValueError("its voxels are not in the same file")
        header.get_slope_inter()
    except UNREADABLE as error:
        raise _fault(path, f"not readable as NIfTI ({shown(error)}); download it again") from error
    if len(shape) not in dimensions:
        raise _fault(path, f"{len(shape)}-D ({_times(shape)}), not {_join(dimensions, ' or ')}-D")
    if dtype.kind not in "iuf":
        raise _fault(path, f"voxels are {'RGB colours' if dtype.fields else dtype.name}, not real numbers")
    if min(shape) < 1:
        raise _fault(path, f"empty volume ({_times(shape)})")
    claimed, on_disk = math.prod(shape) * dtype.itemsize + offset, Path(path).stat().st_size
    if math.prod(shape) * max(dtype.itemsize, 4) > LARGEST:
        raise _fault(path, f"header claims {claimed / 2**30:,.1f} GiB; no more than 2 GiB are read")
    if claimed > on_disk * (DEFLATE if _is_gzip(path) else 1):
        raise _fault(path, f"truncated, or a wrong header: {claimed:,} bytes claimed, {on_disk:,} there")
    return header


@np.errstate(all="ignore")  # what overflows or is NaN here and below is found and refused
def spacing_of(header, path):
    """Spacing in mm of X, Y and from slice to slice; InputError where spacing or affine make no sense."""
    spacing = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise _fault(path, f"spacing {_times(spacing)} is not positive; mend pixdim in its header")
    spacing *= {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    extent = spacing[:2] * header.get_data_shape()[:2]
    if extent.min() < EXTENT_MM[0] or extent.max() > EXTENT_MM[1]:
        raise _fault(path, f"spacing {_times(spacing)} mm, slices of {_times(extent)} mm; mend its header")
    try:
        axes = header.get_best_affine()[:3, :3]
    except UNREADABLE as error:
        raise _fault(path, f"affine not readable ({shown(error)}); mend its header") from error
    # The axes need not be orthogonal (in M&Ms they are not always), but they must span a volume.
    lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(axes).all() and abs(np.linalg.det(axes)) > 1e-6 * lengths.prod()):
        raise _fault(path, "affine is singular or not finite; mend its header")
    return tuple(float(mm) for mm in spacing)


@np.errstate(all="ignore")
def read_image(path, dimensions=(4,)):
    """The voxels of an image, as stored where these are 8 or 16 bits, else float32.

    Raises InputError where they are not finite, or all the same.
    """
    image = _read_voxels(path, read_header(path, dimensions))
    if image.dtype.kind == "f" or image.dtype.itemsize > 2:
        image = image.astype(np.float32, copy=False)
    low, high = image.min(), image.max()  # NaN where any voxel is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _fault(path, "NaN or infinite voxels; export it again")
    if low == high:
        raise _fault(path, f"constant image ({low:g} everywhere); download it again")
    return image


def _read_voxels(path, header):
    """Voxels in the units of the image: as stored, or scaled to floats where the header has a scale."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    try:
        content = _read(path, offset + math.prod(shape) * dtype.itemsize)
        if header.get_slope_inter() in ((None, None), (1, 0)):
            return np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
        return np.asarray(nib.arrayproxy.ArrayProxy(io.BytesIO(content), header, mmap=False), np.float32)
    except UNREADABLE as error:
        raise _fault(path, f"truncated or damaged ({shown(error)}); download it again") from error


def _read(path, size):
    """The first `size` bytes of a file, unpacked at once where it is gzipped: half the time of in pieces."""
    if _is_gzip(path):
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        content = unpacker.decompress(Path(path).read_bytes(), size)
        unpacker.decompress(unpacker.unconsumed_tail, 1)  # to the end, where its checksum is compared
        if unpacker.eof and len(content) == size:
            return content
    with _open(path) as file:  # not packed, in several parts, or not what its header says
        content = file.read(size)
        file.read(1)  # the end, as above
    if len(content) < size:
        raise EOFError(f"{len(content):,} of {size:,} bytes")
    return content


def _is_gzip(path):
    return Path(path).suffix.lower() == ".gz"


def _open(path):
    return gzip.open(path) if _is_gzip(path) else open(path, "rb")


# -------------------------------------------------------------------------------------------------- labels


def load_labels(case):
    """Expert labels {frame: uint8 (X, Y, Z)}; InputError unless ED and ES, and no other frame, have any."""
    if not case.labels:
        return {}
    volumes = [read_label_values(path) for path in case.labels]
    if len(volumes) == 1:
        labels = {t: volumes[0][..., t] for t in range(case.shape[3])}
    else:
        labels = dict(zip((case.ed, case.es), volumes))
    present = [t for t, label in labels.items() if label.any()]
    if set(present) != {case.ed, case.es}:
        empty = [phase for phase, t in (("ED", case.ed), ("ES", case.es)) if t not in present]
        what = f"ground truth is empty at {_join(empty, ' and ')}" if empty else "label in the wrong frame"
        where = f"frame {_join(present)}" if present else "no frame"
        what += f": labels in {where}, but ED is {case.ed} and ES {case.es} (from 0); mend either"
        raise _fault(case.labels[0], what)
    order = np.array(case.label_order, np.uint8)
    return {t: order[labels[t]] for t in present}


@np.errstate(all="ignore")
def read_label_values(path):
    """Values of a label file as uint8, each one of 0, 1, 2, 3."""
    voxels = _read_voxels(path, read_header(path, (3, 4)))
    values = voxels.astype(np.uint8, copy=False)
    if (values is not voxels and (values != voxels).any()) or values.max() > len(LABELS):
        unknown = (values != voxels) | (values > len(LABELS))
        examples = ", ".join(f"{value:g}" for value in np.unique(voxels[unknown])[:4])
        raise _fault(path, f"unknown label {examples}; labels are 0, 1, 2 and 3")
    return values


def _looks_swapped(labels):
    """Whether more of label 3's border is myocardium than of label 1's: the myocardium encloses the LV."""
    beside = np.zeros((4, 4))  # how often one label lies beside another within a slice
    for label in labels:
        for one, other in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            counts = np.bincount((4 * one + other).ravel(), minlength=16).reshape(4, 4)
            beside += counts + counts.T
    np.fill_diagonal(beside, 0)
    enclosed = beside[:, MYO] / beside.sum(axis=1).clip(1)
    return enclosed[RV] > enclosed[LV] > 0


# ------------------------------------------------------------------------------------- folders and messages


def shown(text):
    """A path, message or value from outside, on one line whatever it holds."""
    text = str(text)
    return text if text.isprintable() else ascii(text)


def _fault(path, what):
    return InputError(f"{shown(path)}: {what}")


def _join(values, comma=", "):
    return comma.join(str(value) for value in values)


def _times(numbers):
    return " x ".join(f"{number:g}" for number in numbers)


def _listing(folder):
    """What lies in a folder, sorted, hidden files (such as macOS's ._ files) left out."""
    try:
        return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _fault(folder, f"not readable as a folder ({error.strerror})") from error


def _find_base(root):
    """The folder that holds Training, Validation or Testing: `root`, or the one folder in it that does."""
    if not root.is_dir():
        raise _fault(root, "no such folder; give --data the folder that holds Training")
    for folders in ([root], [path for path in _listing(root) if path.is_dir()]):
        bases = [f for f in folders if any(p.name.title() in SPLITS and p.is_dir() for p in _listing(f))]
        if len(bases) > 1:
            raise _fault(root, f"give --data one of its datasets: {_join(shown(b.name) for b in bases)}")
        if bases:
            return bases[0]
    raise _fault(root, "no folder Training, Validation or Testing in it; give --data the one above them")


def _case_folders(base, places):
    """[(place, case folder)] for places such as "training/labeled", spelt in any case on disk."""
    found = []
    for place in places:
        folders = [base]
        for name in place.split("/"):
            folders = [p for f in folders for p in _listing(f) if p.name.lower() == name and p.is_dir()]
        found += [(place, path) for folder in folders for path in _listing(folder) if path.is_dir()]
    return found


def _read_all(folders, read):
    """(cases, problems): `read(place, folder)` of each (place, folder), or the line that says why not."""
    cases, problems = [], {}
    places = collections.defaultdict(list)
    for place, folder in folders:
        places[folder.name.lower()].append(place)
    for place, folder in folders:
        try:
            if len(places[folder.name.lower()]) > 1:
                raise InputError(f"duplicate case, in {' and '.join(places[folder.name.lower()])}; keep one")
            cases.append(read(place, folder))
        except InputError as fault:
            problems[f"{shown(folder.name)}: {fault}"] = None  # a dict: a duplicate is said once, in order
    return cases, list(problems)


def _find_file(folder, stem):
    """The file STEM.nii.gz or STEM.nii in a folder, spelt in any case."""
    names = {path.name.lower(): path for path in _listing(folder)}
    for suffix in (".nii.gz", ".nii"):
        if path := names.get(f"{stem}{suffix}".lower()):
            return path
    raise _fault(folder / f"{stem}.nii.gz", "no such file; download it again")


def _check_label_shape(path, shape):
    found = read_header(path, (len(shape),)).get_data_shape()
    if found != shape:
        raise _fault(path, f"labels of shape {_times(found)}, the image has {_times(shape)}")


def _phases(ed, es, frames, first):
    """Zero-based (ED, ES) from two cells of a table that counts frames from `first`."""
    phases = []
    for phase, text in (("ED", ed), ("ES", es)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value.is_integer() and first <= value < first + frames):
            what = ascii(text)[:80] if text else "empty"
            raise InputError(f"{phase} is {what}, not a frame from {first} to {first + frames - 1}")
        phases.append(int(value) - first)
    if phases[0] == phases[1]:
        raise InputError(f"ED and ES are the same frame, {int(value)}")
    return phases


# ------------------------------------------------------------------------------------------- M&Ms and ACDC


def _read_mms(base, table):
    """(cases, problems, warnings) of a folder in the M&Ms layout.

    Where a split is absent altogether (not downloaded), rows without a folder are taken to be its rows; they
    do not name their split, but ED = ES = 0 marks those of Training/Unlabeled. Else they are problems.
    """
    rows, problems = _read_rows(table)
    folders = _case_folders(base, MMS_PLACES)
    cases, faults = _read_all(folders, partial(_mms_case, base, table, rows))
    absent = set(MMS_PLACES) - {place for place, _ in folders}
    lost, excused = sorted(set(rows) - {folder.name.lower() for _, folder in folders}), 0
    for line, row in (rows[code][0] for code in lost):
        unlabelled = {row["ED"], row["ES"]} <= {"", "0"}
        if absent & {UNLABELLED} if unlabelled else absent - {UNLABELLED}:
            excused += 1
        else:
            faults.append(f"{row['External code']}: no such folder (line {line} of {shown(table.name)})")
    warnings = [f"{excused} rows of {shown(table.name)} have no folder; absent: {_join(sorted(absent))}"]
    return cases, problems + faults, warnings if excused else []


def _read_rows(table):
    """{code in lower case: [(line, {column: text})]} of the table, and problems of rows that name no case."""
    rows, problems = collections.defaultdict(list), []
    try:
        with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            content = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error) as error:
        raise _fault(table, f"not readable as CSV ({shown(error)})") from error
    for columns in (("External code",), ("ED",), ("ES",), ("Vendor", "VendorName")):
        if not set(columns) & set(reader.fieldnames):
            found = ascii(", ".join(reader.fieldnames))[:200]
            raise _fault(table, f"no column {_join(columns, ' or ')}; the first line is {found}")
    for line, row in content:
        row = {name: text.strip() for name, text in row.items() if name}  # '' is the index, or cells too many
        if CODE.fullmatch(row["External code"]):
            rows[row["External code"].lower()].append((line, row))
        elif any(row.values()):
            what = f"line {line}: External code {ascii(row['External code'])[:80]}"
            problems.append(f"{shown(table.name)}: {what} is not made of letters, digits, '.', '_' and '-'")
    return rows, problems


def _mms_case(base, table, rows, place, folder):
    found = rows.get(folder.name.lower(), [])
    if len(found) != 1:
        what = f"duplicate code, lines {_join((n for n, _ in found), ' and ')}" if found else "no row"
        raise InputError(f"{what} in {shown(table.name)}")
    line, row = found[0]
    code, centre = row["External code"], row.get("Centre", "")
    image = _find_file(folder, f"{code}_sa")
    header = read_header(image)
    shape, ed, es, labels = header.get_data_shape(), None, None, ()
    try:
        vendor = _vendor(row.get("Vendor", ""), row.get("VendorName", ""))
        if not re.fullmatch(r"[\w. -]{0,99}", centre, re.ASCII):
            raise InputError(f"Centre {ascii(centre)[:80]} is not made of letters and digits")
        if place != UNLABELLED:
            ed, es = _phases(row["ED"], row["ES"], shape[3], first=0)
    except InputError as fault:
        raise InputError(f"line {line} of {shown(table.name)}: {fault}") from fault
    if place != UNLABELLED:  # whose label files, where there are any, are empty
        labels = (_find_file(folder, f"{code}_sa_gt"),)
        _check_label_shape(labels[0], shape)
    split, spacing = place.split("/")[0].title(), spacing_of(header, image)
    return Case(code, vendor, centre, split, ed, es, base, image, labels, MMS_ORDER, shape, spacing)


def _vendor(letter, name):
    """Letter of a vendor, from its column or, where that is empty, from the name."""
    if not letter:
        name = name.lower().replace("general electric", "ge")
        letter = next((key for key, maker in VENDORS.items() if re.match(rf"{maker.lower()}\b", name)), "")
    if letter.upper() not in VENDORS:
        raise InputError(f"Vendor is {ascii(letter or name)[:80]}, not A Siemens, B Philips, C GE or D Canon")
    return letter.upper()


def _acdc_case(base, place, folder):
    code, info = folder.name, folder / "Info.cfg"
    if not CODE.fullmatch(code):
        raise InputError("the folder's name is not made of letters, digits, '.', '_' and '-'")
    try:
        lines = info.read_text(errors="replace").splitlines()
    except OSError as error:
        raise _fault(info, f"not readable ({error.strerror}); download it again") from error
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    image = _find_file(folder, f"{code}_4d")
    header = read_header(image)
    shape = header.get_data_shape()
    try:
        ed, es = _phases(fields.get("ED", ""), fields.get("ES", ""), shape[3], first=1)
    except InputError as fault:
        raise _fault(info, fault) from fault
    labels = tuple(_find_file(folder, f"{code}_frame{t + 1:02d}_gt") for t in (ed, es))
    for path in labels:
        _check_label_shape(path, shape[:3])
    spacing = spacing_of(header, image)
    return Case(code, "A", "", place.title(), ed, es, base, image, labels, ACDC_ORDER, shape, spacing)

"""How M&Ms and ACDC are stored on disk: from their folders and tables to cases.

`read_cases` looks only at paths, tables and NIfTI headers, a millisecond per case, so that faults are found
before anything long is started. Only `_mms_case` and `_acdc_case` know how the two datasets differ:

    M&Ms   CODE_sa.nii.gz, one 4-D label file   ED and ES in one table, zero-based     1 LV, 2 MYO, 3 RV
    ACDC   CODE_4d.nii.gz, 3-D file per frame   ED and ES in Info.cfg, one-based       1 RV, 2 MYO, 3 LV
"""

import collections
import csv
import os
import re
from functools import partial
from pathlib import Path

from cardiac.cases import LV, MYO, RV, SPLITS, VENDORS, Case, Dataset
from cardiac.files import InputError, file_error, joined, printable
from cardiac.nifti import read_header, sizes, spacing_of

MMS_ORDER, ACDC_ORDER = (0, LV, MYO, RV), (0, RV, MYO, LV)  # our label for each value in their files
UNLABELLED = "training/unlabeled"
MMS_PLACES = ("training/labeled", UNLABELLED, "validation", "testing")  # case folders; letter case ignored
ACDC_PLACES = ("training", "testing")

CODE = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


def read_cases(root):
    """The `Dataset` in folder `root`, from its headers; InputError if there is none."""
    base = _find_base(Path(root))
    tables = _tables(base) or _tables(root)  # beside the unpacked folder
    if len(tables) > 1:
        names = joined(printable(path.name) for path in tables)
        what = f"{len(tables)} files match *opendataset.csv ({names}); keep one of them"
        raise file_error(tables[0].parent, what)
    patients = [pair for pair in _case_folders(base, ACDC_PLACES) if "patient" in pair[1].name.lower()]
    if tables:
        kind, (cases, problems, warnings) = "M&Ms", _read_mms(base, tables[0])
    elif patients:
        kind, (cases, problems), warnings = "ACDC", _read_all(patients, partial(_acdc_case, base)), []
    else:
        what = "no table *opendataset.csv (M&Ms) and no folders training/patient001 (ACDC) in it"
        raise file_error(base, f"{what}; copy the downloaded table there")
    if not cases and not problems:
        raise file_error(base, "no folders of cases in it; give --data the folder that holds Training")
    cases = sorted(cases, key=lambda case: (SPLITS.index(case.split), case.code))
    return Dataset(base, Path(root).resolve().name, kind, tuple(cases), tuple(problems), tuple(warnings))


# ------------------------------------------------------------------------------------------------- folders


def _listing(folder):
    """A folder's contents, sorted, without what systems add (hidden files, @eaDir, __MACOSX)."""
    try:
        return sorted(path for path in Path(folder).iterdir() if not path.name.startswith((".", "@", "__")))
    except OSError as error:
        raise file_error(folder, f"not readable as a folder ({error.strerror})") from error


def _tables(folder):
    return [path for path in _listing(folder) if path.name.lower().endswith("opendataset.csv")]


def _find_base(root):
    """The folder that holds Training, Validation or Testing: `root`, or the one folder in it that does."""
    if not root.is_dir():
        raise file_error(root, "no such folder; give --data the folder that holds Training")
    inside = (path for path in _listing(root) if path.is_dir())  # a lost+found is not readable
    for folders in ([root], [path for path in inside if os.access(path, os.R_OK | os.X_OK)]):
        bases = [f for f in folders if any(p.name.title() in SPLITS and p.is_dir() for p in _listing(f))]
        if len(bases) > 1:
            names = joined(printable(base.name) for base in bases)
            raise file_error(root, f"give --data one of its datasets: {names}")
        if bases:
            return bases[0]
    raise file_error(root, "no folder Training, Validation or Testing in it; give --data their parent folder")


def _case_folders(base, places):
    """[(place, case folder)] for places such as "training/labeled", ignoring letter case."""
    found = []
    for place in places:
        folders = [base]
        for name in place.split("/"):
            folders = [p for f in folders for p in _listing(f) if p.name.lower() == name and p.is_dir()]
        found += [(place, path) for folder in folders for path in _listing(folder) if path.is_dir()]
    return found


def _read_all(folders, read):
    """(cases, problems): `read(place, folder)` of each (place, folder), or a line that says why it failed."""
    cases, problems = [], {}
    places = collections.defaultdict(list)
    for place, folder in folders:
        places[folder.name.lower()].append(place)
    for place, folder in folders:
        try:
            if len(places[folder.name.lower()]) > 1:
                raise InputError(f"duplicate case, in {' and '.join(places[folder.name.lower()])}; keep one")
            cases.append(read(place, folder))
        except InputError as error:
            problems[f"{printable(folder.name)}: {error}"] = None  # a dict: duplicates once, in order
    return cases, list(problems)


def _find_file(folder, stem):
    """The file STEM.nii.gz or STEM.nii in a folder, ignoring letter case."""
    names = {path.name.lower(): path for path in _listing(folder)}
    for suffix in (".nii.gz", ".nii"):
        if path := names.get(f"{stem}{suffix}".lower()):
            return path
    raise file_error(folder / f"{stem}.nii.gz", "no such file; download it again")


def _check_label_shape(path, shape):
    found = read_header(path, (len(shape),)).get_data_shape()
    if found != shape:
        raise file_error(path, f"labels of shape {sizes(found)}, the image has {sizes(shape)}")


def _phases(ed, es, frames, first):
    """Zero-based (ED, ES) from two cells of a table that counts frames from `first`."""
    phases = []
    for phase, text in (("ED", ed), ("ES", es)):
        frame = int(float(text)) - first if re.fullmatch(r"\d{1,9}(\.0*)?", text, re.ASCII) else -1
        if not 0 <= frame < frames:
            what = ascii(text)[:80] if text else "empty"
            raise InputError(f"{phase} is {what}, not a frame from {first} to {first + frames - 1}")
        phases.append(frame)
    if phases[0] == phases[1]:
        raise InputError(f"ED and ES are the same frame, {phases[0] + first}")
    return phases


# ------------------------------------------------------------------------------------------- M&Ms and ACDC


def _read_mms(base, table):
    """(cases, problems, warnings) of a folder in the M&Ms layout.

    If a split is missing altogether (not downloaded), rows without a folder are assumed to belong to it; rows
    do not name their split, but ED = ES = 0 marks those of Training/Unlabeled. Otherwise they are problems.
    """
    rows, problems = _read_rows(table)
    folders = _case_folders(base, MMS_PLACES)
    cases, faults = _read_all(folders, partial(_mms_case, base, table, rows))
    absent = set(MMS_PLACES) - {place for place, _ in folders}
    lost, excused = sorted(set(rows) - {folder.name.lower() for _, folder in folders}), 0
    for line, row in (rows[code][0] for code in lost):
        unlabelled = {row["ED"].lower(), row["ES"].lower()} <= {"", "0", "0.0", "nan"}
        if absent & {UNLABELLED} if unlabelled else absent - {UNLABELLED}:
            excused += 1
        else:
            faults.append(f"{row['External code']}: no such folder (line {line} of {printable(table.name)})")
    warnings = [f"{excused} rows of {printable(table.name)} have no folder; absent: {joined(sorted(absent))}"]
    return cases, problems + faults, warnings if excused else []


def _read_rows(table):
    """{code in lower case: [(line, {column: text})]} of the table, and problems: rows without valid code."""
    rows, problems = collections.defaultdict(list), []
    try:
        with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            content = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error) as error:
        raise file_error(table, f"not readable as CSV ({printable(error)})") from error
    for columns in (("External code",), ("ED",), ("ES",), ("Vendor", "VendorName")):
        if not set(columns) & set(reader.fieldnames):
            found = ascii(", ".join(reader.fieldnames))[:200]
            raise file_error(table, f"no column {joined(columns, ' or ')}; the first line is {found}")
    for line, row in content:
        row = {name: text.strip() for name, text in row.items() if name}  # '' is the index, or surplus cells
        if CODE.fullmatch(row["External code"]):
            rows[row["External code"].lower()].append((line, row))
        elif any(row.values()):
            what = f"line {line}: External code {ascii(row['External code'])[:80]}"
            what += " is not made of letters, digits, '.', '_' and '-'"
            problems.append(f"{printable(table.name)}: {what}")
    return rows, problems


def _mms_case(base, table, rows, place, folder):
    found = rows.get(folder.name.lower(), [])
    if len(found) != 1:
        what = f"duplicate code, lines {joined((n for n, _ in found), ' and ')}" if found else "no row"
        raise InputError(f"{what} in {printable(table.name)}")
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
    except InputError as error:
        raise InputError(f"line {line} of {printable(table.name)}: {error}") from error
    if place != UNLABELLED:  # unlabelled cases may have label files, but empty ones
        labels = (_find_file(folder, f"{code}_sa_gt"),)
        _check_label_shape(labels[0], shape)
    split, spacing = place.split("/")[0].title(), spacing_of(header, image)
    return Case(code, vendor, centre, split, ed, es, base, image, labels, MMS_ORDER, shape, spacing)


def _vendor(letter, name):
    """Letter of a vendor, from its column or, if that is empty, from the name."""
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
        raise file_error(info, f"not readable ({error.strerror}); download it again") from error
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    image = _find_file(folder, f"{code}_4d")
    header = read_header(image)
    shape = header.get_data_shape()
    try:
        ed, es = _phases(fields.get("ED", ""), fields.get("ES", ""), shape[3], first=1)
    except InputError as error:
        raise file_error(info, error) from error
    labels = tuple(_find_file(folder, f"{code}_frame{t + 1:02d}_gt") for t in (ed, es))
    for path in labels:
        _check_label_shape(path, shape[:3])
    spacing = spacing_of(header, image)
    return Case(code, "A", "", place.title(), ed, es, base, image, labels, ACDC_ORDER, shape, spacing)

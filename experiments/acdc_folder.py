"""Make the folder called ACDC in docs/results.md: 70 patients of the challenge's training set, ED and ES.

    python experiments/acdc_folder.py --data ACDC_DOWNLOAD --out ACDC

DATA is the challenge's download (training/patient001/Info.cfg, ...). Every patient of docs/acdc_split.csv
becomes OUT/SPLIT/ACDC001/ACDC001_sa.nii.gz and ..._sa_gt.nii.gz of two frames, 0 = ED and 1 = ES, with labels
in the order of M&Ms (1 LV, 2 MYO, 3 RV).
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

from cardiac.cases import load_case
from cardiac.files import read_csv, write_csv
from cardiac.layouts import read_cases

PATIENTS = Path(__file__).resolve().parent.parent / "docs" / "acdc_split.csv"
PLACES = {"Training": "Training/Labeled", "Validation": "Validation", "Testing": "Testing"}
COLUMNS = ("External code", "Vendor", "ED", "ES", "Pathology")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the download: the folder above training/")
    parser.add_argument("--out", type=Path, default=Path("ACDC"), help="folder to write (default: ACDC)")
    args = parser.parse_args(argv)
    cases = {case.code: case for case in read_cases(args.data).good(skip_bad=True)}
    patients = read_csv(PATIENTS)
    missing = [each["patient"] for each in patients if each["patient"] not in cases]
    if missing:
        raise SystemExit(f"{args.data}: no {missing[0]} (and {len(missing) - 1} more), or not readable")
    rows = []
    for patient in patients:
        case, code = cases[patient["patient"]], patient["patient"].replace("patient", "ACDC")
        image, labels, _ = load_case(case)
        frames, source = [case.ed, case.es], nib.load(case.image)
        folder = args.out / PLACES[patient["split"]] / code
        folder.mkdir(parents=True, exist_ok=True)
        experts = np.stack([labels[frame] for frame in frames], -1)
        for kind, array in (("sa", image[..., frames]), ("sa_gt", experts)):
            volume = nib.Nifti1Image(array, source.affine)
            volume.header.set_zooms(source.header.get_zooms())
            volume.header.set_xyzt_units(*source.header.get_xyzt_units())
            nib.save(volume, folder / f"{code}_{kind}.nii.gz")
        rows.append(dict(zip(COLUMNS, (code, "A", 0, 1, patient["diagnosis"]))))
    write_csv(args.out / "acdc_opendataset.csv", COLUMNS, rows)
    print(f"{args.out}: {len(rows)} patients")


if __name__ == "__main__":
    main()

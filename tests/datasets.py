"""Tiny datasets for tests, in the layouts of M&Ms and ACDC: a beating ring and a crescent beside it."""

import csv
from dataclasses import dataclass

import nibabel as nib
import numpy as np

TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
MAKERS = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}
SPACING = (1.4, 1.3, 9.0)  # mm


@dataclass
class Tiny:
    """A case to write; the folder is relative to the root, such as "Training/Labeled"."""

    code: str
    folder: str = "Training/Labeled"
    vendor: str = "A"
    ed: int = 0
    es: int = 2

    @property
    def labelled(self):
        return not self.folder.endswith("Unlabeled")


MMS_CASES = (
    Tiny("A0A0A0", vendor="A"),
    Tiny("B0B0B0", vendor="B", ed=4, es=1),  # ED is the last frame: time wraps around
    Tiny("C0C0C0", "Training/Unlabeled", "C"),
    Tiny("D1A1A1", "Validation", "A"),
    Tiny("D2C2C2", "Validation", "C"),
    Tiny("E1A1A1", "Testing", "A"),
    Tiny("E2D2D2", "Testing", "D", ed=4, es=2),
)


def heart(shape, ed, es, seed=0):
    """Image float32 and labels uint8 (M&Ms order) of all frames, both `shape` (X, Y, Z, T)."""
    rng = np.random.default_rng(seed)
    x, y, z, frames = shape
    grid_x, grid_y = np.meshgrid(np.arange(x), np.arange(y), indexing="ij")
    labels = np.zeros(shape, np.uint8)
    shift = rng.uniform(-1.5, 1.5, 2)
    systole = (es - ed) % frames  # frames from ED to ES, going forward in time
    for t in range(frames):
        phase = (t - ed) % frames
        contraction = min(phase / systole, (frames - phase) / (frames - systole))
        for k in range(z):
            size = min(x, y) * (0.17 - 0.012 * k) * (1 - 0.3 * contraction)  # radius of the LV
            wall = min(x, y) * 0.06 * (1 + 0.4 * contraction)
            center = x * 0.55 + shift[0], y * 0.5 + shift[1]
            distance = np.hypot(grid_x - center[0], grid_y - center[1])
            beside = np.hypot(grid_x - center[0] + size + 1.5 * wall, grid_y - center[1])
            label = labels[..., k, t]
            label[beside < 0.9 * size + wall] = 3
            label[distance < size + wall] = 2
            label[distance < size] = 1
    intensity = np.array([60, 200, 90, 180], np.float32) * rng.uniform(0.9, 1.1)
    return intensity[labels] + rng.normal(0, 8, shape).astype(np.float32), labels


def write_nifti(path, array, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.diag([-spacing[0], -spacing[1], spacing[2], 1]))
    image.header.set_zooms((*spacing, 0.04)[: array.ndim])
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def write_table(path, cases):
    columns = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES")
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for index, case in enumerate(cases):
            ed, es = (case.ed, case.es) if case.labelled else (0, 0)
            writer.writerow((index, case.code, MAKERS[case.vendor], case.vendor, index % 5 + 1, ed, es))


def write_mms(root, cases=MMS_CASES, shape=(40, 36, 3, 5), spacing=SPACING):
    """Write a valid dataset in the M&Ms layout below `root`; returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, case in enumerate(cases):
        image, labels = heart(shape, case.ed, case.es, seed)
        experts = np.zeros_like(labels)
        if case.labelled:
            experts[..., [case.ed, case.es]] = labels[..., [case.ed, case.es]]
        folder = root / case.folder / case.code
        write_nifti(folder / f"{case.code}_sa.nii.gz", image.astype(np.int16), spacing)
        write_nifti(folder / f"{case.code}_sa_gt.nii.gz", experts, spacing)
    write_table(root / TABLE, cases)
    return root


def write_acdc(root, training=2, testing=1, shape=(40, 36, 3, 5), ed=0, es=2, spacing=SPACING):
    """Write a valid dataset in the layout of ACDC below `root` (ED, ES zero-based here); returns `root`."""
    for split, first, count in (("training", 1, training), ("testing", 101, testing)):
        for number in range(first, first + count):
            code = f"patient{number:03d}"
            folder = root / split / code
            image, labels = heart(shape, ed, es, number)
            write_nifti(folder / f"{code}_4d.nii.gz", image.astype(np.int16), spacing)
            for t in (ed, es):
                frame = image[..., t].astype(np.int16)
                write_nifti(folder / f"{code}_frame{t + 1:02d}.nii.gz", frame, spacing)
                swapped = np.array([0, 3, 2, 1], np.uint8)[labels[..., t]]  # ACDC: 1 RV, 2 MYO, 3 LV
                write_nifti(folder / f"{code}_frame{t + 1:02d}_gt.nii.gz", swapped, spacing)
            lines = (f"ED: {ed + 1}", f"ES: {es + 1}", "Group: NOR", "Height: 170.0", f"NbFrame: {shape[3]}")
            (folder / "Info.cfg").write_text("\n".join(lines) + "\n")
    return root

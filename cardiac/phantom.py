"""A beating heart with a known truth, in the layout of M&Ms: `python -m cardiac.phantom DIR`.

The heart and its chest are those of `heart.py`; here they are scanned and stored as four vendors would. Also
written, for all frames: DIR/truth/CODE_sa_gt_all.nii.gz, labels (X, Y, Z, T), uint8, and
CODE_displacement.nii.gz (X, Y, Z, T, 2), float32, in mm along the first and second array axis. The tissue at
x in frame t was at x + u(x, t) at ED: sampling ED's image or label there (moving = ED, fixed = t) gives
frame t's. u is 0 at ED and a multiple of 1/256 mm, so that it compresses well.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from cardiac.files import InputError, Parser, write_csv, write_json
from cardiac.heart import DISEASES, TIP, Chest, Heart, Section, time_course

CSV_NAME = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
MARKER = "phantom.json"  # a folder with this file in it is a phantom and may be overwritten
SPLITS = {"training": ("Training/Labeled", "AB"), "validation": ("Validation", "ABCD"),
          "testing": ("Testing", "ABCD"), "unlabelled": ("Training/Unlabeled", "C")}
OPTIONS = {  # default, least, meaning
    "training": (12, 0, "labelled cases, vendors A and B in turn"),
    "validation": (4, 0, "cases, vendors A, B, C, D in turn"),
    "testing": (24, 0, "cases, vendors A, B, C, D in turn"),
    "unlabelled": (2, 0, "training cases without labels, vendor C"),
    "frames": (12, 4, "frames in a heartbeat"),
    "slices": (None, 1, "slices of every case (None: 6 to 9)"),
    "size": (128, 32, "in-plane matrix, varied around this"),
    "seed": (0, 0, "random seed"),
}
MARGIN = 20.0  # mm painted beyond the image, for tissue that moves into view


@dataclass(frozen=True)
class Vendor:
    """How a scanner shows tissue; signals are relative to A's blood, at 1.5 T with balanced SSFP."""

    name: str
    centres: tuple
    matrix: float  # in-plane matrix relative to --size
    blood: float
    myocardium: float
    fat: float
    liver: float
    gamma: float  # of the contrast curve; below 1 lifts dark tissue
    psf: float  # mm, standard deviation of the in-plane point spread
    noise: float  # standard deviation in each of the two channels whose magnitude is taken (Rician)
    bias: float  # log-amplitude of the shading by receive coils across the image
    scale: float  # grey value of signal 1: every vendor stores magnitudes in units of its own


# A and B: nearly equal protocols. C: flat contrast of a low flip angle, bright fat, pixels interpolated from
# a coarse acquisition, twice the noise. D: dark liver and fat, steep curve, coarse, strong shading, low SNR.
VENDORS = {
    "A": Vendor("Siemens", (1,), 1.00, 1.00, 0.34, 0.95, 0.42, 1.00, 0.7, 0.020, 0.15, 280),
    "B": Vendor("Philips", (2, 3), 1.06, 0.96, 0.37, 0.88, 0.45, 0.95, 0.8, 0.025, 0.20, 900),
    "C": Vendor("GE", (4,), 1.20, 0.86, 0.46, 1.25, 0.60, 0.75, 1.3, 0.045, 0.40, 2400),
    "D": Vendor("Canon", (5,), 0.90, 0.74, 0.42, 0.50, 0.25, 1.35, 1.7, 0.065, 0.60, 120),
}


def draw_geometry(rng, vendor, size, slices):
    """Grid of a case: shape (X, Y), zooms (mm, mm, mm), affine (4, 4)."""
    long = round(size * vendor.matrix * rng.uniform(0.94, 1.06))
    shape = [long, round(long * rng.uniform(0.84, 0.98))][:: rng.choice([-1, 1])]
    # The field of view is cut to the heart's surroundings (a scan has 300 to 400 mm): at size 128, pixels are
    # 1.1 to 1.9 mm as scanners have them; at another size the pixels change and the heart stays in view.
    pixel = rng.uniform(185, 210) / long
    zooms = np.array([pixel, pixel, rng.uniform(5, 10)])
    axes, _ = np.linalg.qr(np.eye(3)[:, rng.permutation(3)] + rng.normal(0, 0.3, (3, 3)))
    if rng.random() < 0.2:  # as in some files, not quite orthonormal
        axes += rng.normal(0, 2e-3, (3, 3))
    affine = np.eye(4)
    affine[:3, :3] = axes * zooms
    affine[:3, 3] = rng.normal(0, 30, 3) - affine[:3, :3] @ [shape[0] / 2, shape[1] / 2, slices / 2]
    return shape, zooms, affine


def draw_shading(rng, shape, front, vendor):
    """Sensitivity of the receive coils (X, Y), strongest in front of the chest, where most of them lie."""
    x = 2 * np.indices(shape, np.float32) / np.float32(shape).reshape(2, 1, 1) - 1
    tilt, bend = front + np.float32(rng.normal(0, 0.3, 2)), np.float32(rng.normal(0, 0.3, 2))
    return np.exp(vendor.bias * (np.tensordot(tilt, x, 1) + np.tensordot(bend, x**2, 1)))


def beating_slice(rng, section, chest, slab, share, shape, pixel, vendor):
    """One slice in all frames: tissue signal (X, Y, T), label (X, Y, T), displacement (X, Y, T, 2) in mm.

    `slab` is the slice's thickness as a share of the LV's length, `share` (T,) of the contraction reached.
    """
    fine = pixel / 2  # paint on a grid twice as fine, so that pulling back costs no sharpness
    wide = [2 * n + round(2 * MARGIN / fine) for n in shape]
    grains = [gaussian_filter(rng.standard_normal(wide, np.float32), mm / fine) for mm in (1.2, 5.0)]
    texture = [grain / grain.std() for grain in grains]
    position = np.indices(wide, np.float32) * np.float32(fine) - np.float32(MARGIN)
    alone, atria, heart = (layer**vendor.gamma for layer in chest.paint(section, position, texture, vendor))
    above_apex = min(max(section.height / slab + 0.5, 0.0), 1.0)  # share of the slab
    atria, heart = alone + above_apex * (atria - alone), alone + above_apex * (heart - alone)

    tissue = np.zeros((*shape, len(share)), np.float32)
    label = np.zeros((*shape, len(share)), np.uint8)
    displacement = np.zeros((*shape, len(share), 2), np.float32)
    grid = np.indices(shape, np.float32) * np.float32(pixel)
    for t, reached in enumerate(share):
        u = np.rint((section.pull_back(grid, reached * above_apex) - grid) * 256) / 256
        base = 1 - reached * section.heart.shortening
        above_base = min(max((section.height - base) / slab + 0.5, 0.0), 1.0)
        layer = heart + above_base * (atria - heart) if above_base else heart
        tissue[..., t] = map_coordinates(layer, (grid + u + MARGIN) / fine, order=1, mode="nearest")
        if section.height >= TIP and above_base < 0.5:
            label[..., t] = section.label(grid + u)
        displacement[..., t, :] = np.moveaxis(u, 0, -1)
    return tissue, label, displacement


def make_case(rng, vendor, frames=12, slices=None, size=128):
    """Draw a case of this `Vendor`, as a dict: `image` (X, Y, Z, T) int16 or float64; in all frames the
    true `label` (X, Y, Z, T) uint8 and `displacement` (X, Y, Z, T, 2) float32 in mm; `ed` and `es` (frames),
    `pathology`, `affine` (4, 4), `zooms` (mm, mm, mm, s).
    """
    pathology = str(rng.choice(list(DISEASES), p=[0.4, 0.2, 0.2, 0.1, 0.1]))
    heart = Heart(rng, DISEASES[pathology])
    chest = Chest(rng, heart)
    slices = slices or int(rng.integers(6, 10))
    shape, zooms, affine = draw_geometry(rng, vendor, size, slices)
    shading = draw_shading(rng, shape, chest.front, vendor)
    ed = int(rng.choice([0, frames - 1]))  # the R wave starts the recording or ends it
    es = (ed + max(2, round(frames * rng.uniform(0.35, 0.45)))) % frames
    share = time_course(frames, ed, es)
    # Stacks extend up to about a slice beyond apex and base, short ones less. So the heart is as long as its
    # stack: shorter than in life (80 to 95 mm) if there are few slices.
    beyond = rng.uniform(0.2, 1.1, 2) * min(1, (slices - 1) / 5)
    slab = 1 / (slices - beyond.sum().item())
    heights = ((np.arange(slices) + 0.5 - beyond[0]) * slab).tolist()
    # The ventricles lie near the centre of the image; the long axis is tilted against the stack, and every
    # slice has a breath-hold of its own.
    middle = zooms[:2] * shape / 2 + rng.uniform(-12, 12, 2)
    middle -= 0.45 * heart.rv_depth * np.array([np.cos(heart.angle), np.sin(heart.angle)])
    lean = rng.normal(0, 0.08, 2) * zooms[2] / slab
    image = np.zeros((*shape, slices, frames), np.float32)
    label = np.zeros(image.shape, np.uint8)
    displacement = np.zeros((*image.shape, 2), np.float32)
    for z, height in enumerate(heights):
        section = Section(heart, height, middle + lean * (height - 0.5) + rng.normal(0, 1, 2))
        tissue, label[:, :, z], displacement[:, :, z] = beating_slice(
            rng, section, chest, slab, share, shape, zooms[0].item(), vendor)
        signal = gaussian_filter(tissue, (vendor.psf / zooms[0],) * 2 + (0,)) * shading[..., None]
        noise = vendor.noise * rng.standard_normal((2, *signal.shape), np.float32)
        image[:, :, z] = vendor.scale * np.hypot(signal + noise[0], noise[1])
    if rng.random() < 0.5:  # stored from base to apex
        image, label, displacement = image[:, :, ::-1], label[:, :, ::-1], displacement[:, :, ::-1]
        affine[:3, 3] += affine[:3, 2] * (slices - 1)
        affine[:3, 2] *= -1
    image = np.rint(image).astype(np.int16) if rng.random() < 0.8 else image.astype(np.float64)
    seconds = rng.uniform(0.75, 1.1) / frames  # 55 to 80 beats a minute
    return {"image": image, "label": label, "displacement": displacement, "ed": ed, "es": es,
            "pathology": pathology, "affine": affine, "zooms": (*zooms.tolist(), seconds)}


def true_labels(root, code):
    """The true labels of a case of the phantom at `root`, in every frame: (X, Y, Z, T) uint8."""
    return np.asarray(nib.load(root / "truth" / f"{code}_sa_gt_all.nii.gz").dataobj)


def is_complete(root):
    """Whether there is a complete phantom at `root`."""
    return (root / CSV_NAME).exists()


def write_phantom(root, **options):
    """Write a dataset in the layout of M&Ms to the folder `root`; `options` are numbers, see OPTIONS.

    Case k of a split depends on k, seed, frames, slices and size, not on the number of cases. An existing
    phantom is replaced. Raises InputError if a number is too small, or `root` holds something else.
    """
    settings = {name: default for name, (default, _, _) in OPTIONS.items()} | options
    for name, value in settings.items():
        if value is not None and value < OPTIONS[name][1]:
            raise InputError(f"--{name} {value}: must be {OPTIONS[name][1]} or more")
    root = _prepare_folder(root)
    write_json(root / MARKER, settings)
    rows = []
    for order, (split, (folder, vendors)) in enumerate(SPLITS.items()):
        labelled = split != "unlabelled"
        for k in range(settings[split]):
            rng = np.random.default_rng([settings["seed"], order, k])
            letter = vendors[k % len(vendors)]
            case = make_case(rng, VENDORS[letter], *(settings[name] for name in ("frames", "slices", "size")))
            code = _code(1_000_000 * order + k)
            _write_case(root / folder / code, root / "truth", case, labelled)
            sex, stature = ("F", rng.normal(164, 6)) if rng.random() < 0.5 else ("M", rng.normal(177, 7))
            rows.append({  # as in M&Ms: the index has no name, and without labels ED and ES are 0
                "": len(rows), "External code": code, "VendorName": VENDORS[letter].name, "Vendor": letter,
                "Centre": int(rng.choice(VENDORS[letter].centres)), "ED": labelled * case["ed"],
                "ES": labelled * case["es"], "Age": int(rng.integers(20, 85)), "Pathology": case["pathology"],
                "Sex": sex, "Height": round(stature),
                "Weight": round(rng.normal(25, 3) * (stature / 100) ** 2),
            })
    columns = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age", "Pathology", "Sex",
               "Height", "Weight")
    write_csv(root / CSV_NAME, columns, rows)  # last: it marks the phantom as complete


def _prepare_folder(root):
    """Make the folder, or empty an older phantom; InputError if anything else is in the way."""
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise InputError(f"{root}: is a file; name a folder for the phantom")
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).exists():
        raise InputError(f"{root}: not empty and not a phantom; name a new folder")
    (root / CSV_NAME).unlink(missing_ok=True)
    for folder in ("Training", "Validation", "Testing", "truth"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(parents=True)
    return root


def _write_case(folder, truth, case, labelled):
    """Image and labels of ED and ES (all 0 if not `labelled`) to `folder`, those of all frames to `truth`."""
    expert = np.zeros_like(case["label"])
    if labelled:
        expert[..., [case["ed"], case["es"]]] = case["label"][..., [case["ed"], case["es"]]]
    folder.mkdir(parents=True)
    for place, kind, array in (
        (folder, "sa", case["image"]), (folder, "sa_gt", expert),
        (truth, "sa_gt_all", case["label"]), (truth, "displacement", case["displacement"]),
    ):
        volume = nib.Nifti1Image(array, case["affine"])
        volume.header.set_zooms((*case["zooms"], 1.0)[: array.ndim])
        volume.header.set_xyzt_units("mm", "sec")
        nib.save(volume, place / f"{folder.name}_{kind}.nii.gz")


def _code(number):
    """A name like A0S9V9; different numbers give different names."""
    number = (number * 7_368_787 + 4_321_987) % 260**3  # the factor has no divisor in common with 260
    return "".join(f"{chr(65 + number // 260**i % 260 // 10)}{number // 260**i % 10}" for i in range(3))


def main(argv=None):
    """The command line. Returns the exit status: 2 if an argument is wrong."""
    what = __doc__.partition(":")[0] + "."
    parser = Parser(prog="python -m cardiac.phantom", description=what)
    parser.add_argument("root", metavar="DIR", help="folder to write")
    for name, (default, least, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{meaning} (default {default}, minimum {least})")
    try:
        write_phantom(**vars(parser.parse_args(argv)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

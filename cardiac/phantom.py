"""A beating heart with a known truth, in the layout of M&Ms: `python -m cardiac.phantom DIR`.

A short-axis slice is painted once, at end-diastole (ED). Every other frame pulls it back through an analytic,
invertible in-plane map, so label and displacement are exact in every frame. In the LV's polar coordinates
the map is linear in the squared radius, piece by piece along every ray: LV and RV cavity lose area with
ejection; the wall's area grows by 1 / (1 - longitudinal shortening), so that the wall keeps its volume and
thickens; beyond the heart the motion dies away. Twist turns the rays, and the heart swings as a whole.

Through the plane only the base moves, towards the apex, by the same shortening. A slice it leaves behind
fades to the atria as their share of its slab grows, and has no label from one half on. The displacement
stays in the plane and knows nothing of this: in such a frame it carries ED's label to where the truth has
none. A slab that lies partly below the apex moves less, in proportion.

Also written, for all frames: DIR/truth/CODE_sa_gt_all.nii.gz, labels (X, Y, Z, T), uint8, and
CODE_displacement.nii.gz (X, Y, Z, T, 2), float32, in mm along the first and second array axis. The tissue at
x in frame t was at x + u(x, t) at ED: sampling ED's image or label there (moving = ED, fixed = t) gives
frame t's. u is 0 at ED and a multiple of 1/256 mm, so that gzip finds something to do.
"""

import shutil
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from cardiac import LABELS
from cardiac.files import InputError, Parser, write_csv, write_json

CSV_NAME = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
MARKER = "phantom.json"  # a folder with this file in it is ours and may be written again
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
    "seed": (0, 0, "another seed, other cases"),
}
REACH = 34.0  # mm beyond the heart in which its motion dies away; over 1.54 x the largest motion: invertible
MARGIN = 20.0  # mm painted beyond the image, for tissue that moves into view
TIP = 0.05  # share of the LV's length, at the apex, that is muscle alone: no labels there


@dataclass(frozen=True)
class Vendor:
    """How a scanner shows tissue; signals relative to the blood of A, at 1.5 T with balanced SSFP."""

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
    scale: float  # grey values of signal 1: every vendor stores magnitude in units of its own


# A and B: nearly one protocol. C: a low flip angle's flat contrast, bright fat, fine pixels interpolated from
# a coarse acquisition, twice the noise. D: dark liver and fat, steep curve, coarse, strong shading, low SNR.
VENDORS = {
    "A": Vendor("Siemens", (1,), 1.00, 1.00, 0.34, 0.95, 0.42, 1.00, 0.7, 0.020, 0.15, 280),
    "B": Vendor("Philips", (2, 3), 1.06, 0.96, 0.37, 0.88, 0.45, 0.95, 0.8, 0.025, 0.20, 900),
    "C": Vendor("GE", (4,), 1.20, 0.86, 0.46, 1.25, 0.60, 0.75, 1.3, 0.045, 0.40, 2400),
    "D": Vendor("Canon", (5,), 0.90, 0.74, 0.42, 0.50, 0.25, 1.35, 1.7, 0.065, 0.60, 120),
}

# Ranges to draw from, by M&Ms' names of pathologies, after adult reference values of CMR (Kawel-Boehm 2015)
# and each disease's textbook picture. At ED: LV cavity radius, wall thickness (mm), share by which the septum
# is thicker, RV depth (mm). Then ejection fractions of LV and RV by volume, longitudinal shortening of both.
Disease = namedtuple("Disease", "radius wall asymmetry rv_depth ejection rv_ejection shortening")
DISEASES = {
    "NOR": Disease((23, 27), (7.5, 9.0), (0.0, 0.1), (28, 34), (0.55, 0.66), (0.45, 0.55), (0.14, 0.18)),
    "DCM": Disease((27, 30), (6.0, 7.5), (0.0, 0.1), (28, 36), (0.20, 0.36), (0.30, 0.42), (0.05, 0.09)),
    "HCM": Disease((22, 24), (9.5, 11.0), (0.2, 0.4), (26, 31), (0.60, 0.68), (0.45, 0.55), (0.10, 0.14)),
    "HHD": Disease((23, 26), (9.5, 11.5), (0.0, 0.1), (27, 32), (0.50, 0.62), (0.45, 0.55), (0.11, 0.15)),
    "ARV": Disease((22, 25), (7.0, 8.5), (-0.1, 0.0), (38, 44), (0.48, 0.60), (0.25, 0.38), (0.12, 0.16)),
}


class Heart:
    """One patient's heart: lengths in mm at ED, angles in radians in array axes, changes at ES."""

    def __init__(self, rng, disease):
        drawn = Disease(*(rng.uniform(*limits) for limits in disease))
        self.radius, self.wall, self.asymmetry, self.rv_depth = drawn[:4]
        self.shortening = drawn.shortening
        # Volume is area times length: length takes its share of the ejection, area the rest.
        self.contraction = 1 - (1 - drawn.ejection) / (1 - drawn.shortening)
        self.rv_contraction = 1 - (1 - drawn.rv_ejection) / (1 - drawn.shortening)
        self.uneven = rng.uniform(0, 0.2), rng.uniform(0, 2 * np.pi)  # contraction around it: share, phase
        # The apex turns by about 9 degrees, the base by 3 against it; less where ejection is weak.
        self.twist = np.deg2rad([rng.uniform(6, 11), -rng.uniform(2, 5)]) * drawn.ejection / 0.6
        self.angle = np.deg2rad(rng.uniform(140, 250)).item()  # from the LV to the RV
        self.rv_from = rng.uniform(0.12, 0.25)  # height of the RV's apex, see `Section`
        self.wobble = rng.uniform(0, (0.02, 2 * np.pi), (3, 2)).tolist()  # harmonics 2 to 4: share, phase
        turn, ratio = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1.0, 1.12))  # the LV is a little oval
        axis = np.outer(*[[np.cos(turn), np.sin(turn)]] * 2)
        self.stretch = (ratio * axis + (np.eye(2) - axis) / ratio).astype(np.float32)  # determinant 1
        turn = rng.uniform(0, 2 * np.pi)
        swing = rng.uniform(0.5, 3.0) * np.array([np.cos(turn), np.sin(turn)])
        self.swing = swing.astype(np.float32).reshape(2, 1, 1)


class Section:
    """One slice through a `Heart`: outlines and tissue at ED, and the motion.

    `height` is 0 at the LV's apex and 1 at its base at ED, `centre` (2,) the LV's. Positions are in mm along
    the two array axes from the first pixel's centre, arrays (2, X, Y).
    """

    def __init__(self, heart, height, centre):
        self.heart, self.height = heart, height
        self.centre = np.float32(centre).reshape(2, 1, 1)
        inside = min(max(height, TIP), 1.0)
        self.inner = heart.radius * (1 - (1 - inside) ** 2) ** 0.45  # about half an ellipsoid
        self.wall = heart.wall * (0.75 + 0.25 * inside)  # thinner towards the apex
        self.rv_depth = heart.rv_depth * max(0.0, (inside - heart.rv_from) / (1 - heart.rv_from)) ** 0.6
        self.twist = float(heart.twist[0] + (heart.twist[1] - heart.twist[0]) * inside)

    def polar(self, position):
        """Radius (mm) and angle from the RV, in the coordinates in which the LV is round."""
        y = np.tensordot(np.linalg.inv(self.heart.stretch), position - self.centre, 1)
        return np.hypot(*y), np.arctan2(y[1], y[0]) - self.heart.angle

    def outlines(self, angle):
        """Radii (mm) at ED of LV cavity, wall and RV along rays; no RV where that is below the wall's."""
        waves = enumerate(self.heart.wobble, start=2)
        inner = self.inner * (1 + sum(a * np.cos(m * angle + phase) for m, (a, phase) in waves))
        wall = inner + self.wall * (1 + self.heart.asymmetry * np.cos(angle))
        if not self.rv_depth:
            return inner, wall, np.zeros_like(wall)
        # The free wall lies on a circle about a point inside the septum: the LV cuts a crescent out of it.
        off = 0.8 * (self.inner + self.wall)
        radius = self.rv_depth + 0.25 * off
        free = off * np.cos(angle) + np.sqrt(np.maximum(radius**2 - (off * np.sin(angle)) ** 2, 0))
        return inner, wall, free

    def label(self, position):
        """Label (uint8) of the tissue at ED positions. Papillary muscles count as cavity, as experts draw."""
        r, angle = self.polar(position)
        values = [np.uint8(LABELS[name]) for name in ("LV", "MYO", "RV")]
        return np.select([r < outline for outline in self.outlines(angle)], values, np.uint8(0))

    def pull_back(self, position, share):
        """Where the tissue at `position` was at ED, when `share` (0 to 1) of the contraction is reached."""
        heart = self.heart
        near = _fade(np.hypot(*(position - self.centre)) / 110)
        r, angle = self.polar(position - share * heart.swing * near)
        angle = angle - share * self.twist * _fade((r - self.inner - self.wall) / REACH)
        inner, wall, free = self.outlines(angle)
        gap = free - wall  # the RV's zone narrows to 2 mm where the outlines meet: no crease in the motion
        edge = wall + 0.5 * (gap + np.sqrt(gap**2 + 16))
        # Area factors of cavity, wall and RV since ED, then the squared radii of their outlines now.
        cavity = 1 - share * heart.contraction * (1 + heart.uneven[0] * np.cos(angle - heart.uneven[1]))
        muscle, right = 1 / (1 - share * heart.shortening), 1 - share * heart.rv_contraction
        inner2 = cavity * inner**2
        wall2 = inner2 + muscle * (wall**2 - inner**2)
        edge2 = wall2 + right * (edge**2 - wall**2)
        r2, edge_now = r**2, np.sqrt(edge2)
        squared = np.where(r2 < inner2, r2 / cavity, np.where(
            r2 < wall2, inner**2 + (r2 - inner2) / muscle, wall**2 + np.maximum(r2 - wall2, 0) / right))
        beyond = r + (edge - edge_now) * _fade((r - edge_now) / REACH)
        r = np.where(r2 < edge2, np.sqrt(squared), beyond)
        ray = np.stack([np.cos(angle + heart.angle), np.sin(angle + heart.angle)])
        return self.centre + np.tensordot(heart.stretch, r * ray, 1)


class Chest:
    """What lies around one patient's heart, and how a slice is painted; mm from the LV's centre."""

    def __init__(self, rng, heart):
        outer = heart.radius + heart.wall
        front = heart.angle + rng.uniform(0.35, 0.75)  # the sternum is before the RV, the liver below both
        self.front = np.float32([np.cos(front), np.sin(front)])
        self.below = np.float32([-np.sin(front), np.cos(front)])
        self.radius = rng.uniform(95, 120)  # of the chest wall's inner side
        self.middle = (outer + 0.85 * heart.rv_depth + rng.uniform(3, 9) - self.radius) * self.front
        self.layers = rng.uniform(9, 14), rng.uniform(8, 25)  # thickness of muscle, and of fat under the skin
        self.diaphragm = outer + rng.uniform(-1, 6)
        self.spine = -(outer + rng.uniform(38, 46)) * self.front + rng.uniform(-20, 0) * self.below
        self.aorta = -(outer + rng.uniform(12, 17)) * self.front + rng.uniform(5, 18) * self.below
        self.aorta_radius, self.rim = rng.uniform(9, 12), rng.uniform(2, 5)  # rim: epicardial fat
        self.papillary = [np.pi + side * rng.uniform(0.8, 1.1) for side in (-1, 1)]  # angles from the RV
        self.papillary_radius = rng.uniform(3.0, 4.5)

    def paint(self, section, position, texture, vendor):
        """Signal at ED positions (2, n, m), three times: chest alone, with the atria, with the ventricles.

        `texture` (2, n, m) is fine and coarse, of unit variance. Later layers lie over earlier ones.
        """
        fine, coarse = texture
        flesh = 1 + 0.08 * fine + 0.05 * coarse
        fat, myocardium = vendor.fat * flesh, vendor.myocardium * flesh
        blood = vendor.blood * (1 + 0.04 * fine)
        y = position - section.centre
        wall = np.hypot(*(y - self.middle.reshape(2, 1, 1))) - self.radius - 0.8 * coarse
        # Heart and diaphragm touch along the whole stack: it rises towards the apex as the heart tapers.
        depth = np.tensordot(self.below, y, 1) - self.diaphragm + 0.6 * (section.heart.radius - section.inner)
        aorta, spine = (np.hypot(*(y - at.reshape(2, 1, 1))) for at in (self.aorta, self.spine))
        chest = 0.09 + 0.12 * np.maximum(fine + coarse - 1.8, 0)  # lung and its vessels
        chest = _over(chest, vendor.liver * flesh, depth - 3 * coarse)
        chest = _over(chest, 0.9 * myocardium, 24 + 2 * coarse - spine)
        chest = _over(chest, fat, self.aorta_radius + 4 + coarse - aorta)
        chest = _over(chest, blood, self.aorta_radius - aorta)
        chest = _over(chest, 0.75 * myocardium, wall)
        chest = _over(chest, fat, np.minimum(wall, 3 * (coarse - 0.9)))  # streaks in the muscle
        chest = _over(chest, fat, wall - self.layers[0])
        chest = _over(chest, 0.01, wall - sum(self.layers))  # air

        r, angle = section.polar(position)
        inner, wall, free = section.outlines(angle)
        epicardium = np.maximum(wall, free + 3)  # the RV's wall is 3 mm thin and has no label
        pad = self.rim * (1 + 0.35 * coarse + np.maximum(np.cos(angle + 0.6), 0))  # thickest before the RV
        heart = _over(_over(chest, fat, epicardium + pad - r), myocardium, epicardium - r)
        trabeculae = 0.35 * np.maximum(fine - 0.8, 0) * (vendor.blood - vendor.myocardium)
        heart = _over(heart, blood - trabeculae, free - r)
        heart = _over(heart, myocardium, wall - r)
        atria = _over(heart, blood, wall - 2.5 - r)  # the left one's wall is thin
        heart = _over(heart, blood, inner - r)
        for at in self.papillary if 0.25 < section.height < 0.8 else ():
            across = np.hypot(r * np.cos(angle - at) - 0.68 * inner, r * np.sin(angle - at))
            heart = _over(heart, myocardium, self.papillary_radius - across)
        return chest, atria, heart


def _over(image, value, distance):
    """`image` with `value` painted where a signed distance (mm) is positive; the edge is 1.2 mm wide."""
    return image + (value - image) * np.clip(0.5 + distance / 1.2, 0, 1)


def _fade(x):
    """1 up to x = 0, 0 from x = 1, smooth between; the steepest slope is -1.54."""
    return (1 - np.clip(x, 0, 1) ** 2) ** 2


def time_course(frames, ed, es):
    """Share of the contraction reached, a list of T numbers from 0 at frame `ed` to 1 at frame `es`.

    Systole is one pull; diastole has the fast early filling (3/4 of the volume), a pause, the atrial kick.
    """
    systole = (es - ed) % frames
    since = (np.arange(frames) - ed) % frames
    rest = np.clip((since - systole) / (frames - systole), 0, 1)  # of diastole gone by
    filled = 0.75 * (1 - _fade(rest / 0.5)) + 0.25 * (1 - _fade((rest - 0.7) / 0.3))
    return (np.sin(np.pi / 2 * np.minimum(since / systole, 1)) ** 2 * (1 - filled)).tolist()


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
    """Sensitivity of the receive coils (X, Y), strongest before the chest, where most of them lie."""
    x = 2 * np.indices(shape, np.float32) / np.float32(shape).reshape(2, 1, 1) - 1
    tilt, bend = front + np.float32(rng.normal(0, 0.3, 2)), np.float32(rng.normal(0, 0.3, 2))
    return np.exp(vendor.bias * (np.tensordot(tilt, x, 1) + np.tensordot(bend, x**2, 1)))


def beat(rng, section, chest, slab, share, shape, pixel, vendor):
    """One slice in all frames: tissue signal (X, Y, T), label (X, Y, T), displacement (X, Y, T, 2) in mm.

    `slab` is the slice's thickness as a share of the LV's length, `share` (T) of the contraction reached.
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
    # Stacks end up to a slice beyond apex and base, short ones less. The heart is as long as its stack, then:
    # shorter than in life (80 to 95 mm) where slices are few.
    beyond = rng.uniform(0.2, 1.1, 2) * min(1, (slices - 1) / 5)
    slab = 1 / (slices - beyond.sum().item())
    heights = ((np.arange(slices) + 0.5 - beyond[0]) * slab).tolist()
    # The middle of both ventricles lies near the image's; the long axis leans against the stack, and every
    # slice has a breath-hold of its own.
    middle = zooms[:2] * shape / 2 + rng.uniform(-12, 12, 2)
    middle -= 0.45 * heart.rv_depth * np.array([np.cos(heart.angle), np.sin(heart.angle)])
    lean = rng.normal(0, 0.08, 2) * zooms[2] / slab
    image = np.zeros((*shape, slices, frames), np.float32)
    label = np.zeros(image.shape, np.uint8)
    displacement = np.zeros((*image.shape, 2), np.float32)
    for z, height in enumerate(heights):
        section = Section(heart, height, middle + lean * (height - 0.5) + rng.normal(0, 1, 2))
        tissue, label[:, :, z], displacement[:, :, z] = beat(
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


def write_phantom(root, training=12, validation=4, testing=24, unlabelled=2, frames=12, slices=None, size=128,
                  seed=0):
    """Write a dataset in the layout of M&Ms to the folder `root`; what the numbers mean is in OPTIONS.

    Case k of a split depends on k, seed, frames, slices and size, and not on how many others there are. A
    phantom that is there is replaced. InputError: a number is too small, or `root` holds something else.
    """
    counts = {"training": training, "validation": validation, "testing": testing, "unlabelled": unlabelled}
    settings = {**counts, "frames": frames, "slices": slices, "size": size, "seed": seed}
    for name, (_, least, _) in OPTIONS.items():
        if settings[name] is not None and settings[name] < least:
            raise InputError(f"--{name} {settings[name]}: has to be {least} or more")
    root = _claim(root)
    write_json(root / MARKER, settings)
    rows = []
    for order, (split, count) in enumerate(counts.items()):
        folder, vendors = SPLITS[split]
        labelled = split != "unlabelled"
        for k in range(count):
            rng = np.random.default_rng([seed, order, k])
            letter = vendors[k % len(vendors)]
            case = make_case(rng, VENDORS[letter], frames, slices, size)
            code = _code(1_000_000 * order + k)
            _write_case(root / folder / code, root / "truth", case, labelled)
            sex, stature = ("F", rng.normal(164, 6)) if rng.random() < 0.5 else ("M", rng.normal(177, 7))
            rows.append({  # as in M&Ms: the index has no name, and 0 stands for frames without labels
                "": len(rows), "External code": code, "VendorName": VENDORS[letter].name, "Vendor": letter,
                "Centre": int(rng.choice(VENDORS[letter].centres)), "ED": labelled * case["ed"],
                "ES": labelled * case["es"], "Age": int(rng.integers(20, 85)), "Pathology": case["pathology"],
                "Sex": sex, "Height": round(stature),
                "Weight": round(rng.normal(25, 3) * (stature / 100) ** 2),
            })
    columns = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age", "Pathology", "Sex",
               "Height", "Weight")
    write_csv(root / CSV_NAME, columns, rows)  # comes last: with it the phantom is whole


def _claim(root):
    """Make the folder, or empty an older phantom; InputError where anything else is in the way."""
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
    """The command line. Returns the exit status: 2 where what was typed is wrong."""
    what = __doc__.partition(":")[0] + "."
    parser = Parser(prog="python -m cardiac.phantom", description=what)
    parser.add_argument("root", metavar="DIR", help="folder to write")
    for name, (default, least, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{meaning} (default {default}, least {least})")
    try:
        write_phantom(**vars(parser.parse_args(argv)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

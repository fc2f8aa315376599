"""A beating heart and the chest around it, as functions of position and time; `phantom.py` samples them.

A short-axis slice is painted once, at end-diastole (ED). Every other frame pulls it back through an analytic,
invertible in-plane map, so label and displacement are exact in every frame. In the LV's polar coordinates
the map is linear in the squared radius, piece by piece along every ray: LV and RV cavity lose area with
ejection; the wall's area grows by 1 / (1 - longitudinal shortening), so that the wall keeps its volume and
thickens; beyond the heart the motion fades. Twist rotates the rays, and the heart also moves as a whole.

Through the plane only the base moves, towards the apex, by the same shortening. A slice that it leaves fades
into the atria as their share of its slab grows, and has no label once that share reaches one half. The
displacement stays in the plane and ignores this: in such a frame it carries ED's label to where the truth has
none. A slab that lies partly below the apex moves proportionally less.
"""

from collections import namedtuple

import numpy as np

from cardiac import LABELS

REACH = 34.0  # mm beyond the heart within which motion fades; invertible: over 1.54 x the largest motion
TIP = 0.05  # share of the LV's length, at the apex, that is only muscle: no labels there

# Ranges to draw from, by M&Ms' pathology codes, after adult reference values of CMR (Kawel-Boehm 2015) and
# textbooks. At ED: LV cavity radius, wall thickness (mm), relative thickening of the septum, RV depth (mm).
# Then ejection fractions of LV and RV and longitudinal shortening of both, as for a cylinder; the labels
# eject more, since the base leaves their largest sections (RV .57 on average for .45 drawn).
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
        # Volume is area times length: shortening gives part of the ejection, loss of area the rest.
        self.contraction = 1 - (1 - drawn.ejection) / (1 - drawn.shortening)
        self.rv_contraction = 1 - (1 - drawn.rv_ejection) / (1 - drawn.shortening)
        self.uneven = rng.uniform(0, 0.2), rng.uniform(0, 2 * np.pi)  # regional variation: share, phase
        # The apex rotates by about 9 degrees, the base by 3 the other way; less if ejection is weak.
        self.twist = np.deg2rad([rng.uniform(6, 11), -rng.uniform(2, 5)]) * drawn.ejection / 0.6
        self.angle = np.deg2rad(rng.uniform(140, 250)).item()  # from the LV to the RV
        self.rv_from = rng.uniform(0.12, 0.25)  # height of the RV's apex, see `Section`
        self.wobble = rng.uniform(0, (0.02, 2 * np.pi), (3, 2)).tolist()  # harmonics 2 to 4: amplitude, phase
        turn, ratio = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1.0, 1.12))  # the LV is a little oval
        axis = np.outer(*[[np.cos(turn), np.sin(turn)]] * 2)
        self.stretch = (ratio * axis + (np.eye(2) - axis) / ratio).astype(np.float32)  # determinant 1
        turn = rng.uniform(0, 2 * np.pi)
        swing = rng.uniform(0.5, 3.0) * np.array([np.cos(turn), np.sin(turn)])
        self.swing = swing.astype(np.float32).reshape(2, 1, 1)


class Section:
    """One slice through a `Heart`: outlines and tissue at ED, and the motion.

    `height` is 0 at the LV's apex, 1 at its base at ED; `centre` (2,) is the LV's. Positions are in mm along
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
        """Radius (mm) and angle from the RV's direction, in coordinates in which the LV is round."""
        y = np.tensordot(np.linalg.inv(self.heart.stretch), position - self.centre, 1)
        return np.hypot(*y), np.arctan2(y[1], y[0]) - self.heart.angle

    def outlines(self, angle):
        """Radii (mm) at ED of LV cavity, wall and RV along rays; RV radii below the wall's mean no RV."""
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
        """Label (uint8) of the tissue at ED positions. Papillary muscles count as cavity, as for experts."""
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
        squared = np.select(
            [r2 < inner2, r2 < wall2],
            [r2 / cavity, inner**2 + (r2 - inner2) / muscle],
            wall**2 + np.maximum(r2 - wall2, 0) / right,
        )
        beyond = r + (edge - edge_now) * _fade((r - edge_now) / REACH)
        r = np.where(r2 < edge2, np.sqrt(squared), beyond)
        ray = np.stack([np.cos(angle + heart.angle), np.sin(angle + heart.angle)])
        return self.centre + np.tensordot(heart.stretch, r * ray, 1)


class Chest:
    """What lies around one patient's heart, and how a slice is painted; mm from the LV's centre."""

    def __init__(self, rng, heart):
        outer = heart.radius + heart.wall
        front = heart.angle + rng.uniform(0.35, 0.75)  # sternum in front of the RV, liver below both
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
        """Three signals at ED positions (2, n, m): of the chest alone, with the atria, with the ventricles.

        `texture` (2, n, m) is a fine and a coarse pattern of unit variance. Later layers cover earlier ones.
        """
        fine, coarse = texture
        flesh = 1 + 0.08 * fine + 0.05 * coarse
        fat, myocardium = vendor.fat * flesh, vendor.myocardium * flesh
        blood = vendor.blood * (1 + 0.04 * fine)
        y = position - section.centre
        wall = np.hypot(*(y - self.middle.reshape(2, 1, 1))) - self.radius - 0.8 * coarse
        # The diaphragm touches the heart in every slice: it rises towards the apex, as the heart tapers.
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
        pad = self.rim * (1 + 0.35 * coarse + np.maximum(np.cos(angle + 0.6), 0))  # thickest over the RV
        heart = _over(_over(chest, fat, epicardium + pad - r), myocardium, epicardium - r)
        trabeculae = 0.35 * np.maximum(fine - 0.8, 0) * (vendor.blood - vendor.myocardium)
        heart = _over(heart, blood - trabeculae, free - r)
        heart = _over(heart, myocardium, wall - r)
        atria = _over(heart, blood, wall - 2.5 - r)  # the left atrium's wall is thin
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

    Systole is one contraction; diastole is fast early filling (3/4 of the volume), a pause, the atrial kick.
    """
    systole = (es - ed) % frames
    since = (np.arange(frames) - ed) % frames
    rest = np.clip((since - systole) / (frames - systole), 0, 1)  # elapsed share of diastole
    filled = 0.75 * (1 - _fade(rest / 0.5)) + 0.25 * (1 - _fade((rest - 0.7) / 0.3))
    return (np.sin(np.pi / 2 * np.minimum(since / systole, 1)) ** 2 * (1 - filled)).tolist()

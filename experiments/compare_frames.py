"""Compare propagated labels of one cine with labels of all its frames: Dice in 3-D over the slices kept.

    python propagate_labels.py --data DATA --out OUT --frames all --nifti
    python experiments/compare_frames.py --out OUT --labels ALL_FRAMES.nii.gz --case CODE
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from common import make_parser

from cardiac import LABELS
from cardiac.files import read_csv
from cardiac.metrics import dice


def main():
    parser = make_parser(__doc__, data=False)
    parser.add_argument("--labels", type=Path, required=True, help="4-D NIfTI on the cine's grid")
    parser.add_argument("--case", required=True, help="code of the case")
    args = parser.parse_args()
    place = args.out / "propagation"
    found = np.asarray(nib.load(place / "nifti" / f"{args.case}_sa_propagated.nii.gz").dataobj)
    other = np.asarray(nib.load(args.labels).dataobj)
    kept = {}
    for row in read_csv(place / "quality.csv"):
        if row["case"] == args.case and row["kept"] == "1":
            kept.setdefault(int(row["frame"]), []).append(int(row["slice"]))
    scores = {}
    for frame, slices in sorted(kept.items()):
        pair = [labels[:, :, slices, frame] for labels in (found, other)]
        scores[frame] = [dice(*(each == label for each in pair)) for label in LABELS.values()]
        print(
            f"frame {frame:2}: slices {slices}",
            *(f"{name} {s:.3f}" for name, s in zip(LABELS, scores[frame])),
        )
    mean = np.nanmean(list(scores.values()), axis=0)
    print(
        f"{len(scores)} frames:",
        *(f"{name} {s:.3f}" for name, s in zip(LABELS, mean)),
        f"mean {mean.mean():.3f}",
    )


if __name__ == "__main__":
    main()

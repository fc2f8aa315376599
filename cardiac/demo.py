"""The whole pipeline on a phantom whose truth is known: `python -m cardiac.demo`.

Writes the phantom, runs the four scripts with settings that take four to twenty minutes on a CPU, and scores
the propagation as no public dataset allows: in every frame, and by displacement in mm.
"""

import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import LABELS, networks, phantom, propagation
from cardiac.cache import open_cache
from cardiac.files import Parser
from cardiac.metrics import dice
from cardiac.run import choose_device, script
from cardiac.settings import PropagationSettings, parse
from cardiac.slices import SliceStore

GRID = "--size 96 --spacing 2"  # 192 mm: the phantom's field of view
STEPS = (
    (train_registration, f"{GRID} --recipe strong --max-steps 1000 --steps-per-epoch 100"),
    (propagate_labels, ""),
    (train_segmentation, "--channels 8 --max-steps 600 --steps-per-epoch 100"),
    (evaluate, ""),
)


@script
def main(argv):
    parser = Parser("python -m cardiac.demo", description=__doc__.splitlines()[0])
    what = "folder for phantom and runs (default: demo)"
    parser.add_argument("--out", type=Path, default=Path("demo"), help=what)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--seed", type=int, default=0, help="seed of phantom and training (default: 0)")
    arguments = parser.parse_args(argv)
    data, out = arguments.out / "phantom", arguments.out / "runs"
    if not phantom.is_complete(data):
        print(f"# python -m cardiac.phantom {data} --seed {arguments.seed}", flush=True)
        phantom.write_phantom(data, seed=arguments.seed)
    common = ["--data", str(data), "--out", str(out)]
    common += ["--device", arguments.device, "--seed", str(arguments.seed)]
    for module, options in STEPS:
        command = [*common, *options.split()]
        print(f"\n# python {module.__name__}.py {shlex.join(command)}", flush=True)
        code = module.main(command)
        if code:
            raise SystemExit(code)
    print("\n# propagation against the truth of the phantom")
    settings = parse(PropagationSettings, common, __doc__, earlier=("registration",))
    print_truth(score_against_truth(settings))
    print(f"\nTo look at:\n  {out}/evaluation/report.html    everything, in a browser")
    for name, what in {
        "registration/example.png": "moving, fixed, warped, differences, sampling grid, Jacobian",
        "propagation/cine.gif": "propagated contours beating",
        "evaluation/table.md": "Table 1",
        "evaluation/predictions": "predictions as NIfTI",
    }.items():
        print(f"  {out}/{name}    {what}")


@torch.no_grad()
def score_against_truth(settings):
    """Score propagated labels and displacements of training cases by the truth: a row per case and frame.

    Dice of each region in 3-D on the case's own grid, over the propagated slices, and its mean over those
    that also have a true label: at the base, tissue moves through the plane, which no in-plane motion can
    follow. Mean end-point error in mm within the true labels, and that of the identity.
    """
    cache, device = open_cache(settings), choose_device(settings.device)
    propagated = propagation.Propagated.read(settings.out / "propagation" / "labels.h5")
    network, _ = propagation.load_registration(settings.out, device)
    rows = []
    for case in [case for case in cache.split("Training") if case.labelled]:
        frames = propagated.of(case)
        labels = propagate_labels.on_own_grid(cache, case, propagated)
        truth = phantom.true_labels(cache.root, case.code)
        path = cache.root / "truth" / f"{case.code}_displacement.nii.gz"
        true_displacement = np.asarray(nib.load(path).dataobj)
        store = SliceStore(cache, [case], device)
        (local,) = store.cases
        ed, expert = store.frame(local, case.ed), store.expert(local, case.ed)
        for frame in frames:
            fixed = store.frame(local, frame)
            found = networks.register(network, ed, fixed, expert, steps=settings.refine)
            found = propagation.own_grid_displacement(found, case.grid(cache)).cpu().numpy()
            found = found.transpose(2, 3, 0, 1) * np.array(case.spacing[:2])  # (X, Y, Z, 2), mm
            kept = (frames[frame] <= max(LABELS.values())).any((1, 2))  # propagated slices
            target, prediction = truth[..., frame][..., kept], labels[..., frame][..., kept]
            row = {"case": case.code, "vendor": case.vendor, "frame": frame}
            row |= {region: dice(prediction == label, target == label) for region, label in LABELS.items()}
            has_truth = target.any((0, 1))  # slices with a true label: the base has not left them
            shown, wanted = prediction[..., has_truth], target[..., has_truth]
            scores = [dice(shown == label, wanted == label) for label in LABELS.values()]
            row["dice_where_labelled"] = float(np.nanmean(scores))
            heart = truth[..., frame] > 0
            true = true_displacement[..., frame, :]
            for name, error in (("error_mm", found - true), ("identity_mm", true)):
                row[name] = float(np.linalg.norm(error, axis=-1)[heart].mean())
            rows.append(row)
    return rows


def print_truth(rows):
    """Print the scores of `score_against_truth`: a line per case, and the mean over all frames."""
    for code in dict.fromkeys(row["case"] for row in rows):
        chosen = [row for row in rows if row["case"] == code]
        print(f"  {code} {chosen[0]['vendor']}  {_means(chosen)}")
    print(f"  all, {len(rows)} frames: {_means(rows)}")


def _means(rows):
    names = [name for name in rows[0] if name not in ("case", "vendor")]
    mean = {name: np.nanmean([row[name] for row in rows]) for name in names}
    regions = "  ".join(f"{region} {mean[region]:.3f}" for region in LABELS)
    total = np.mean([mean[region] for region in LABELS])
    return (f"{regions}  mean {total:.3f}, {mean['dice_where_labelled']:.3f} where the truth has a label; "
            f"end-point error {mean['error_mm']:.2f} mm (identity {mean['identity_mm']:.2f})")


if __name__ == "__main__":
    raise SystemExit(main())

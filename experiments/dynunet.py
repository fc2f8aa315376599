"""Our U-Net against MONAI's DynUNet (nnU-Net's architecture), on the expert labels of one dataset.

    pip install monai
    python experiments/dynunet.py --data DATA --out experiments/runs/dynunet

Three models per seed: the paper's U-Net under the `paper` and under the `strong` recipe, and DynUNet in the
latter's place: same split, augmentation, loss, running average, steps, best checkpoint by Validation. All are
trained by `cardiac.training.fit` and scored as by `evaluate.py`, in 3-D on each case's own grid. Finished
runs are in OUT/cases.csv and are not repeated; a stopped one is resumed. Ends with the Dice on Testing and
paired differences, with 95 % intervals over patients (and seeds). The minutes are wall time, validations
included. Other options are those of train_segmentation.py, for all three.
"""

import numpy as np
import torch
from common import dice_of, make_parser, results, with_interval
from monai.networks.nets import DynUNet

from cardiac import CLASSES, REGIONS, evaluation
from cardiac.cache import open_cache
from cardiac.checkpoint import load_network
from cardiac.evaluation import aligned
from cardiac.files import read_csv
from cardiac.networks import Mirrored, begin_with_background
from cardiac.run import choose_device, run_folder
from cardiac.settings import EvaluationSettings, SegmentationSettings, parse
from cardiac.slices import LabelledSlices, SliceStore
from cardiac.training import fit
from train_segmentation import Segmentation

COLUMNS = ("seed", "parameters", "training_seconds", *evaluation.CASES)


class DynUNetSegmentation(Segmentation):
    """The same task with nnU-Net's 2-D architecture: strided convolutions, instance norm, leaky ReLU."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        settings = self.settings
        torch.manual_seed(settings.seed)
        strides = (1, 2, 2, 2, 2)  # as deep as ours: sides that are multiples of 16 need no padding
        self.network = DynUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=CLASSES,
            kernel_size=[3] * len(strides),
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=[settings.channels * 2**level for level in range(len(strides))],
        )
        begin_with_background(self.network.output_block.conv.conv.bias)  # as ours does


MODELS = {  # name: (recipe, task)
    "U-Net, paper": ("paper", Segmentation),
    "U-Net, strong": ("strong", Segmentation),
    "DynUNet, strong": ("strong", DynUNetSegmentation),
}


def run(model, seed, args, others):
    """Train and score one model: rows of OUT/cases.csv."""
    recipe, task_class = MODELS[model]
    place = args.out / f"seed{seed}" / model.replace(", ", "-")
    # one cache per recipe: they crop the slices differently
    common = ["--data", str(args.data), "--out", str(place), "--cache", str(args.out / f"cache-{recipe}")]
    grid = ["--size", str(args.size), "--spacing", str(args.spacing), "--channels", str(args.channels)]
    budget = ["--max-steps", str(args.steps), "--steps-per-epoch", str(args.steps_per_epoch)]
    chosen = ["--recipe", recipe, "--labels", "original", "--seed", str(seed)]
    typed = [*common, *grid, *budget, *chosen, *others]
    settings = parse(SegmentationSettings, typed, None, own=("segmentation/original",))
    device, cache = choose_device(settings.device), open_cache(settings)
    training, validation, unseen = cache.training_and_validation(seed, settings.held_out)
    store = SliceStore(cache, [case for case in training if case.labelled], device, "training")
    with run_folder(settings, "segmentation/original", cache.cases) as folder:
        validated = SliceStore(cache, validation + unseen, device)
        task = task_class(settings, LabelledSlices(store), validated, unseen)
        print(f"{model}, seed {seed}: {settings.total_steps} steps of {settings.batch_size}")
        fit(task, settings, folder, device)
        load_network(task.network, folder / "best.pt", device)
        seconds = float(read_csv(folder / "log.csv")[-1]["seconds"])
    cases = [case for case in cache.split("Testing") if case.labelled]
    how = EvaluationSettings(data=args.data, out=place, workers=settings.workers)
    network = Mirrored(task.network) if recipe == "strong" else task.network
    scored = evaluation.score_model(model, network, cache, cases, how, device, place / "predictions")
    parameters = sum(each.numel() for each in task.network.parameters())
    return [{"parameters": parameters, "training_seconds": seconds, **row} for row, _ in scored]


def print_results(rows):
    """Print the Dice on Testing, by region and overall, and the paired differences."""
    seeds, cases = ({row[name] for row in rows} for name in ("seed", "case"))
    print(f"\nDice on Testing, {len(cases)} patients, {len(seeds)} seed(s); [95 % interval]\n")
    lines = [["model", *REGIONS, "mean", "parameters", "training minutes"]]
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        cells = [with_interval(dice_of(rows, model, regions), ".3f") for regions in (*zip(REGIONS), REGIONS)]
        minutes = np.mean([float(row["training_seconds"]) for row in own]) / 60
        lines.append([model, *cells, own[0]["parameters"], f"{minutes:.1f}"])
    for better, worse in (("U-Net, strong", "DynUNet, strong"), ("U-Net, strong", "U-Net, paper")):
        cells = [
            with_interval(dice_of(rows, better, regions) - dice_of(rows, worse, regions), "+.3f")
            for regions in (*zip(REGIONS), REGIONS)
        ]
        lines.append([f"{better} - {worse}", *cells, "", ""])
    print(aligned(lines, markdown=True))


def main():
    numbers = {"seeds": 1, "size": 112, "spacing": 1.5, "channels": 16, "steps": 800, "steps_per_epoch": 100}
    args, others = make_parser(__doc__, "dynunet", **numbers).parse_known_args()
    jobs = [{"seed": seed, "model": model} for seed in range(args.seeds) for model in MODELS]

    def train(**job):
        return run(**job, args=args, others=others)

    print_results(results(args.out / "cases.csv", COLUMNS, jobs, train, args, others))


if __name__ == "__main__":
    main()

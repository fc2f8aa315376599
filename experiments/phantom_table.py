"""Table 1 on the phantom under both recipes, with an oracle, trained on the true label of every frame.

    python experiments/phantom_table.py --out experiments/runs/phantom --seeds 5

One registration per recipe carries the labels; each seed trains the U-Nets of each recipe at equal steps,
under `strong` also one that trusts all propagated pixels fully. `--recipes strong` leaves `paper` out. U-Nets
already in OUT/cases.csv are not retrained. Ends with the table, mean and standard deviation over seeds, and
with differences of a patient's mean Dice, with 95 % intervals over patients and seeds.
"""

import shutil
from dataclasses import replace

import numpy as np
from common import by_seed, call, make_parser, over_seeds, phantom_in, results, with_interval

import propagate_labels
import train_registration
import train_segmentation
from cardiac import demo, evaluation
from cardiac.cache import open_cache
from cardiac.checkpoint import load_network
from cardiac.evaluation import aligned
from cardiac.networks import Mirrored, SegmentationNetwork
from cardiac.phantom import true_labels
from cardiac.propagation import Propagated, made_from
from cardiac.run import choose_device, training_digest
from cardiac.settings import EvaluationSettings, PropagationSettings, parse

MODELS = {  # by recipe; those of `paper` trust every pixel fully
    "paper": ("original", "propagated", "oracle"),
    "strong": ("original", "propagated", "full trust", "oracle"),
}
COLUMNS = ("seed", "recipe", *evaluation.CASES)
VENDORS = {"all vendors": "ABCD", "seen A, B": "AB", "unseen C, D": "CD"}
DIFFERENCES = (  # pairs of (recipe, model)
    (("paper", "propagated"), ("paper", "original")),
    (("strong", "propagated"), ("strong", "original")),
    (("strong", "propagated"), ("strong", "full trust")),
    (("strong", "oracle"), ("strong", "propagated")),
    (("strong", "original"), ("paper", "original")),
    (("strong", "propagated"), ("paper", "propagated")),
)


def register_and_propagate(out, common, args):
    """Register and propagate once for all seeds; returns the cache and the labels' true scores."""
    grid = ["--size", args.size, "--spacing", args.spacing]
    call(train_registration, *common, "--out", out, *grid, "--max-steps", args.registration_steps)
    call(propagate_labels, *common, "--out", out)
    typed = [str(word) for word in (*common, "--out", out)]
    settings = parse(PropagationSettings, typed, None, earlier=("registration",))
    return open_cache(settings), demo.score_against_truth(settings)


def train_and_score(model, out, common, seed, args, cache, recipe):
    """Train and score one U-Net: rows of cases.csv."""
    device, place = choose_device("auto"), out / f"seed{seed}" / model.replace(" ", "-")
    shutil.copytree(out / "registered" / "propagation", place / "propagation", dirs_exist_ok=True)
    path = place / "propagation" / "labels.h5"
    if model == "oracle":
        cases = [case for case in cache.split("Training") if case.labelled]
        oracle_labels(cache).write(path, f"the phantom's truth, {training_digest(cases)}")
    if model == "full trust":
        replace(Propagated.read(path), trust=None).write(path, made_from(path))
    kind = "original" if model == "original" else "propagated"
    grid = ["--size", args.size, "--spacing", args.spacing, "--channels", args.channels]
    typed = [str(word) for word in (*common, *grid, "--out", place, "--seed", seed)]
    call(train_segmentation, *typed, "--max-steps", args.steps, "--steps-per-epoch", 100, "--labels", kind)
    network = SegmentationNetwork(args.channels)
    load_network(network, place / "segmentation" / kind / "best.pt", device)
    network = Mirrored(network) if recipe == "strong" else network
    settings = parse(EvaluationSettings, typed, None)
    cases = [case for case in cache.split("Testing") if case.labelled]
    scored = evaluation.score_model(model, network, cache, cases, settings, device, place / "predictions")
    return [row for row, _ in scored]


def oracle_labels(cache):
    """The true label of every frame but ED and ES of the labelled training cases, as `Propagated` labels."""
    labels, where = [], []
    for case in [case for case in cache.split("Training") if case.labelled]:
        truth = true_labels(cache.root, case.code)
        slices = case.grid(cache).labels_to_slices(truth.transpose(3, 2, 0, 1))
        for frame in set(range(case.frames)) - {case.ed, case.es}:
            labels += list(slices[frame])
            where += [(case.code, frame, z) for z in range(case.slices)]
    return Propagated(np.array(labels), where, np.ones(len(labels)))


def dice_of(rows, recipe, model, vendors):
    """Mean Dice (seeds, patients) of one model on these vendors."""
    return by_seed(
        rows, lambda row: (row["recipe"], row["model"]) == (recipe, model) and row["vendor"] in vendors
    )


def print_results(rows, truth):
    """Print Table 1 of both recipes, the differences, and the propagated labels against the truth."""
    seeds = sorted({row["seed"] for row in rows}, key=int)
    numbers = [{**row, "dice": float(row["dice"] or "nan")} for row in rows]
    lines = [["recipe", *evaluation.TABLE]]
    for recipe, model in [(each, model) for each in truth for model in MODELS[each]]:
        own = [row for row in numbers if (row["recipe"], row["model"]) == (recipe, model)]
        tables = [evaluation.table_row(model, [row for row in own if row["seed"] == seed]) for seed in seeds]
        cells = [[table[name] for table in tables] for name in evaluation.TABLE[1:]]
        lines.append([recipe, model, *map(over_seeds, cells)])
    print(f"\n{len(seeds)} seeds; mean (standard deviation over seeds)\n\n{aligned(lines, markdown=True)}\n")
    lines = [["difference", *VENDORS]]
    for better, worse in (pair for pair in DIFFERENCES if {recipe for recipe, _ in pair} <= {*truth}):
        cells = [
            with_interval(dice_of(rows, *better, vendors) - dice_of(rows, *worse, vendors), "+.3f")
            for vendors in VENDORS.values()
        ]
        lines.append([f"{' '.join(better)} - {' '.join(worse)}", *cells])
    print(aligned(lines, markdown=True))
    for recipe, scores in truth.items():
        print(f"\n{recipe}, propagated labels against the truth:")
        demo.print_truth(scores)


def main():
    numbers = {"seeds": 5, "size": 96, "spacing": 1.75, "channels": 8, "steps": 600}
    parser = make_parser(__doc__, "phantom", data=False, **numbers, registration_steps=1500)
    parser.add_argument("--recipes", nargs="+", default=[*MODELS], choices=MODELS, help="default: both")
    args = parser.parse_args()
    data, caches, truth = phantom_in(args.out / "phantom"), {}, {}
    common = {
        # one cache per recipe: they crop the slices differently
        recipe: ["--data", data, "--cache", args.out / f"cache-{recipe}", "--recipe", recipe]
        for recipe in args.recipes
    }
    for recipe in args.recipes:
        place = args.out / recipe / "registered"
        caches[recipe], truth[recipe] = register_and_propagate(place, common[recipe], args)

    def run(seed, recipe, model):
        place = args.out / recipe
        return train_and_score(model, place, common[recipe], seed, args, caches[recipe], recipe)

    jobs = [{"seed": seed, "recipe": recipe, "model": model}
            for seed in range(args.seeds) for recipe in args.recipes for model in MODELS[recipe]]
    print_results(results(args.out / "cases.csv", COLUMNS, jobs, run, args), truth)


if __name__ == "__main__":
    main()

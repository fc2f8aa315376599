"""Our registration against VoxelMorph 0.2, on the same batches: at equal steps, and at equal time.

    pip install --no-deps voxelmorph==0.2
    OMP_NUM_THREADS=1 python experiments/voxelmorph.py --data DATA --out experiments/runs/voxelmorph

Three contestants: ours, `VxmDense` as shipped (default features, int_downsize 2), and the same with
unet_half_res. All use the strong recipe's batches, augmentation, loss and running average of the weights,
Adam at a constant rate without a schedule, and channels_last, which is the faster layout for each of them.
VoxelMorph integrates, resizes and warps with its own layers.

First every contestant is trained at every learning rate of --lrs for --sweep-steps steps; its rate with the
best Validation Dice is kept (OUT/seedK/contest/scores.csv has all scores). Then they take turns of --turn
steps, the next turn always going to the one trained for the shortest time, until the slowest has taken
--steps: one run gives both comparisons. Time is this process's CPU time on one thread, which other work on
the machine disturbs less than wall time; it includes drawing batches, but not scoring. Score: ED's label
carried to ES against the expert's, Dice in 3-D on the cache's grid, every --every steps. For each budget,
Testing is that of the best checkpoint by Validation, mean over --seeds contests.

If stopped, the same command resumes from the last scoring. Other options are those of train_registration.py.
"""

import dataclasses
import time

import numpy as np
import torch
from common import make_parser, over_seeds, voxelmorph_networks
from scipy.ndimage import distance_transform_edt

from cardiac import LABELS, REGIONS
from cardiac.cache import open_cache
from cardiac.checkpoint import write_checkpoint
from cardiac.evaluation import aligned
from cardiac.files import write_csv
from cardiac.losses import one_hot
from cardiac.metrics import dice
from cardiac.preprocessing import most_likely
from cardiac.propagation import NEAR_HEART_MM
from cardiac.run import run_folder
from cardiac.settings import RegistrationSettings, parse
from cardiac.slices import SliceStore
from cardiac.training import WeightAverage
from cardiac.warp import jacobian_determinant
from train_registration import Registration

COLUMNS = ("contestant", "lr", "step", "cpu_seconds", "split", *REGIONS, "mean", "folding_percent")


class VoxelMorph(Registration):
    """The same task with `VxmDense`. Its displacement is also in pixels, along H first, fixed to moving."""

    def __init__(self, settings, training, validation, half_resolution):
        super().__init__(settings, training, validation)
        torch.manual_seed(settings.seed)
        shape = (settings.size, settings.size)
        self.network = voxelmorph_networks().VxmDense(shape, unet_half_res=half_resolution)

    def register(self, moving, fixed, regions):
        """As VxmDense.forward, which does not return both velocity and displacement.

        Its own transformer warps image and labels at once: zeros outside, align_corners=True.
        """
        network = self.network
        flow = network.flow(network.unet_model(torch.cat([moving, fixed], dim=1)))
        velocity = network.resize(flow) if network.resize else flow
        displacement = network.fullsize(network.integrate(velocity))
        return velocity, displacement, network.transformer(torch.cat([moving, regions], 1), displacement)


CONTESTANTS = {
    "ours": Registration,
    "VxmDense": lambda *arguments: VoxelMorph(*arguments, half_resolution=False),
    "VxmDense, half resolution": lambda *arguments: VoxelMorph(*arguments, half_resolution=True),
}


class Entrant:
    """A contestant at one learning rate: its training, time and scores, resumed from OUT."""

    def __init__(self, name, lr, settings, stores, folder):
        self.name, self.lr, self.stores = name, lr, stores
        self.task = CONTESTANTS[name](settings, stores["Training"], stores["Validation"])
        network = self.task.network.to(memory_format=torch.channels_last)
        self.parts = {
            "network": network,
            "optimizer": torch.optim.Adam(network.parameters(), lr=lr),
            "average": WeightAverage(network, settings.averaging),
        }
        self.step, self.seconds, self.rows = 0, 0.0, []
        self.path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{lr:g}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for part, holder in self.parts.items():
                holder.load_state_dict(state[part])
            self.step, self.seconds, self.rows = (state[key] for key in ("step", "seconds", "rows"))

    def train(self, steps):
        """Train for so many more steps, and add their CPU time."""
        begun, optimizer = time.process_time(), self.parts["optimizer"]
        self.task.network.train()
        for _ in range(steps):
            loss = self.task.losses(self.task.draw(self.step))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.step += 1
            self.parts["average"].update(self.step)
        self.seconds += time.process_time() - begun

    def score(self):
        """Score the averaged weights on Validation and Testing, and save."""
        start = {"contestant": self.name, "lr": self.lr, "step": self.step, "cpu_seconds": self.seconds}
        self.task.network.eval()
        with self.parts["average"].applied():
            for split in ("Validation", "Testing"):
                self.rows.append({**start, "split": split, **scores(self.task, self.stores[split])})
        state = {part: holder.state_dict() for part, holder in self.parts.items()}
        progress = {"step": self.step, "seconds": self.seconds, "rows": self.rows}
        write_checkpoint(self.path, {**state, **progress})
        print(f"{self.name}, lr {self.lr:g}: step {self.step}, {self.seconds / 60:.1f} CPU minutes, "
              f"Validation {self.rows[-2]['mean']:.4f}", flush=True)

    def validation(self, step):
        """Validation Dice at a step that was scored."""
        return next(r["mean"] for r in self.rows if r["split"] == "Validation" and r["step"] == step)


@torch.no_grad()
def scores(task, store):
    """ED's label carried to ES: Dice by region and overall, mean over cases, and percent of folded pixels
    within 10 mm of either label.
    """
    found, folding = [], []
    for case in store.cases:
        ed, es = (store.frame(case, frame) for frame in (case.ed, case.es))
        source, target = (store.expert(case, frame) for frame in (case.ed, case.es))
        _, displacement, warped = task.register(ed, es, one_hot(source))
        warped = most_likely(warped[:, 1:].transpose(0, 1).numpy())
        found.append([dice(warped == label, target.numpy() == label) for label in LABELS.values()])
        outside = ((source == 0) & (target == 0)).numpy()
        spacing = store.cache.spacing
        near = distance_transform_edt(outside, sampling=(1e6, spacing, spacing)) <= NEAR_HEART_MM
        folding.append(100 * (jacobian_determinant(displacement).numpy()[near] <= 0).mean())
    by_region = dict(zip(REGIONS, map(float, np.nanmean(found, axis=0))))
    return {**by_region, "mean": float(np.nanmean(found)), "folding_percent": float(np.mean(folding))}


def take_turns(entrants, until, args, wait):
    """Train until all have taken `until` steps; the next turn goes to the one trained for the shortest time.

    wait: whether those that have taken them wait, instead of training on while the others catch up.
    """
    while behind := [entrant for entrant in entrants if entrant.step < until]:
        entrant = min(behind if wait else entrants, key=lambda each: each.seconds)
        entrant.train(args.turn)
        if entrant.step % args.every == 0:
            entrant.score()
    for entrant in entrants:
        if entrant.rows[-1]["step"] != entrant.step:
            entrant.score()


def best(entrant, until):
    """A contestant's figures: steps, CPU minutes, and the scores of its best checkpoint by Validation, among
    those of the first `until` steps or, if None, all.
    """
    rows = [row for row in entrant.rows if until is None or row["step"] <= until]
    found = max((row for row in rows if row["split"] == "Validation"), key=lambda row: row["mean"])
    (test,) = (row for row in rows if row["split"] == "Testing" and row["step"] == found["step"])
    scores = [found["mean"], *(test[name] for name in (*REGIONS, "mean")), test["folding_percent"]]
    return [rows[-1]["step"], rows[-1]["cpu_seconds"] / 60, *scores]


def print_table(contests, until=None):
    """Print one row per contestant: mean over the seeds' contests, standard deviation in brackets."""
    title = ["contestant", "lr", "steps", "CPU minutes", "Validation"]
    lines = [title + [f"Testing {name}" for name in (*REGIONS, "mean")] + ["folding, %"]]
    for same in zip(*contests):
        shown = np.array([best(entrant, until) for entrant in same])
        rates = dict.fromkeys(f"{entrant.lr:g}" for entrant in same)
        forms = (".0f", ".1f", *[".3f"] * 5, ".4f")
        cells = [over_seeds(column, form) for column, form in zip(shown.T, forms)]
        lines.append([same[0].name, ", ".join(rates), *cells])
    print(f"\nequal {'steps' if until else 'time'}\n\n{aligned(lines, markdown=True)}")


def contest(args, others, seed):
    """Run or resume the contest of a seed; returns each contestant at its best learning rate."""
    grid = ["--size", str(args.size), "--spacing", str(args.spacing), "--recipe", "strong"]
    common = ["--data", str(args.data), "--cache", str(args.out / "cache"), "--seed", str(seed)]
    typed = [*common, "--out", str(args.out / f"seed{seed}"), *grid, *others]
    settings = parse(RegistrationSettings, typed, None, own=("contest",))
    cache, device = open_cache(settings), torch.device("cpu")
    training, validation, _ = cache.training_and_validation(settings.seed, settings.held_out)
    cases = {"Training": training, "Validation": validation, "Testing": cache.split("Testing")}
    for split in ("Validation", "Testing"):
        cases[split] = [case for case in cases[split] if len(case.expert) == 2]
    stores = {split: SliceStore(cache, own, device, split) for split, own in cases.items()}

    with run_folder(settings, "contest", cache.cases) as folder:
        entrants = [
            Entrant(name, lr, dataclasses.replace(settings, lr=lr), stores, folder)
            for name in CONTESTANTS
            for lr in args.lrs
        ]
        take_turns(entrants, args.sweep_steps, args, wait=True)
        ranked = sorted(entrants, key=lambda each: each.validation(args.sweep_steps))
        finalists = list({each.name: each for each in ranked}.values())  # the last of each name: its best
        finalists.sort(key=lambda each: list(CONTESTANTS).index(each.name))
        take_turns(finalists, args.steps, args, wait=False)
        write_csv(folder / "scores.csv", COLUMNS, [row for entrant in entrants for row in entrant.rows])
    return finalists


def main():
    numbers = {"seeds": 3, "size": 96, "spacing": 1.5, "steps": 3000, "sweep_steps": 600}
    parser = make_parser(__doc__, "voxelmorph", **numbers, every=200, turn=50)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3], help="learning rates swept")
    args, others = parser.parse_known_args()
    if args.every % args.turn or args.sweep_steps % args.every or args.steps % args.every:
        parser.error("--every must be a multiple of --turn; --sweep-steps and --steps multiples of --every")
    torch.set_num_threads(1)
    contests = [contest(args, others, seed) for seed in range(args.seeds)]
    print_table(contests, args.steps)
    print_table(contests)


if __name__ == "__main__":
    main()

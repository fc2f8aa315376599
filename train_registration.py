"""Step 1: train a network that registers the frames of one patient, on short-axis cine.

Unsupervised, plus the overlap of expert labels where both frames have them. Ends with its quality on the
cases of Validation and Testing: the label of ED warped to ES and compared with the expert's, in 3-D.
"""

import torch

from cardiac import REGIONS, losses, networks, propagation, report
from cardiac.augment import augment_pairs
from cardiac.cache import open_cache
from cardiac.files import write_csv
from cardiac.metrics import dice
from cardiac.parallel import from_first, in_first
from cardiac.run import choose_device, describe, run_folder, script
from cardiac.settings import RegistrationSettings, parse
from cardiac.slices import Pairs, SliceStore
from cardiac.training import fit, load_network
from cardiac.warp import integrate, resize_displacement, warp


class Registration:
    """The task of the training loop: pairs of slices, the loss of VoxelMorph, validation from ED to ES."""

    def __init__(self, settings, training, validation):
        self.settings, self.validation = settings, validation
        self.pairs = Pairs(training, settings.labelled_share)
        torch.manual_seed(settings.seed)
        self.network = networks.RegistrationNetwork()

    def draw(self, step):
        """The pairs of slices of step `step`: a `PairBatch`."""
        batch = self.pairs.draw(self.settings.batch_size, self.settings.seed, step)
        return augment_pairs(batch, self.settings.seed, step) if self.settings.augment else batch

    def losses(self, batch):
        """Image similarity + smoothness + overlap of the labels (Balakrishnan et al., 2019)."""
        velocity = self.network(batch.moving, batch.fixed)
        displacement = resize_displacement(integrate(velocity), batch.fixed.shape[-2:])
        # image and labels go through one grid_sample
        warped = warp(torch.cat([batch.moving, losses.one_hot(batch.moving_labels)], dim=1), displacement)
        image = self.similarity(warped[:, :1], batch.fixed)
        smooth = losses.diffusion(velocity)
        overlap = losses.overlap_loss(warped[:, 1:], losses.one_hot(batch.fixed_labels), batch.labelled)
        loss = image + self.settings.smoothness * smooth + self.settings.dice_weight * overlap
        return {"loss": loss, "image": image, "smooth": smooth, "overlap": overlap}

    def similarity(self, warped, fixed):
        """The image term: mean squared error, or local normalised cross-correlation."""
        if self.settings.similarity == "ncc":
            return losses.local_ncc(warped, fixed)
        return torch.nn.functional.mse_loss(warped, fixed)

    def validate(self):
        """Dice of ED's label warped to ES, by case and region, and the image term, or the latter alone."""
        store, images, scores = self.validation, [], []
        for case in store.cases:
            ed, es = (store.frame(case, frame) for frame in (case.ed, case.es))
            displacement = networks.register(self.network, ed, es)
            images.append(self.similarity(warp(ed, displacement), es))
            if len(case.expert) < 2:
                continue
            labels, target = (store.expert(case, frame) for frame in (case.ed, case.es))
            warped = propagation.warp_labels(labels, displacement).cpu().numpy()
            target = target.cpu().numpy()
            scores += [dice(warped == label, target == label) for label in range(1, 1 + len(REGIONS))]
        loss = torch.stack(images).mean().item()
        if not scores:
            return {"val_loss": loss, "score": -loss}
        score = torch.tensor(scores).nanmean().item()
        return {"val_loss": loss, "val_dice": score, "score": score}


@script
def main(argv):
    settings = parse(RegistrationSettings, argv, __doc__, own=("registration",))
    device = choose_device(settings.device)
    cache = from_first(open_cache, settings)
    training, validation, _ = cache.training_and_validation(settings.seed)
    with in_first(run_folder(settings, "registration", cache.cases)) as folder:
        stores = (
            SliceStore(cache, training, device, "training"),
            SliceStore(cache, validation, device, "validation"),
        )
        task = Registration(settings, *stores)
        print(
            f"registration: {settings.total_steps} steps of {settings.batch_size} pairs on {describe(device)}"
        )
        if not fit(task, settings, folder, device, outcome="quality.csv"):
            return
        load_network(task.network, folder / "best.pt", device)

        tested = [case for case in cache.split("Validation", "Testing") if case.labelled]
        if not tested:
            print("no labelled case in Validation or Testing: quality.csv stays empty")
        rows = propagation.score_registration(task.network, cache, tested, settings, device)
        report.draw_curves(folder)
        report.draw_registration(folder / "example.png", task.network, task.validation)
        write_csv(folder / "quality.csv", propagation.QUALITY, rows)
        report.print_quality(rows)


if __name__ == "__main__":
    raise SystemExit(main())

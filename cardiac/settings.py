"""Every setting of the four scripts: one field each, with its unit; the command lines are made from them."""

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cardiac.files import InputError, Parser, made_by, read_json
from cardiac.parallel import processes

WIDEST = 16  # times VoxelMorph's channels


def setting(default, help, **options):
    """A dataclass field that carries the help text and argparse options of its command-line flag."""
    return field(default=default, metadata={"help": help, **options})


LABELLED_PHASES = setting("both", "expert labels that are known; the other phase's are for scores alone",
                          choices=("ED", "ES", "both"))
LABELLED_CASES = setting(None, "use the labels of only N Training patients, chosen by seed (default: all)",
                         metavar="N")


@dataclass
class Settings:
    """What all four scripts take."""

    STRONG: ClassVar = {"crop": "motion"}  # the defaults that --recipe strong changes
    REMADE: ClassVar = False  # whether results are made anew, not refused, when an earlier run has changed

    data: Path = setting(None, "dataset in the layout of M&Ms or ACDC", required=True)
    out: Path = setting(Path("runs"), "folder of this run")
    cache: Path = setting(None, "folder of slice caches (default: folder `cache` beside OUT)")
    device: str = setting("auto", "where to compute; auto: cuda where there is one",
                          choices=("auto", "cpu", "cuda"))
    size: int = setting(192, "side of the square slices, pixels (a multiple of 16)")
    spacing: float = setting(1.25, "in-plane spacing of the slices, mm")
    crop: str = setting("centre", "slices are cut about the centre of the image, or about what moves",
                        choices=("centre", "motion"))
    seed: int = setting(0, "random seed; what step n draws depends on (seed, n) alone")
    recipe: str = setting("paper", "paper: the paper's method; strong: with the defaults marked so here",
                          choices=("paper", "strong"))
    workers: int = setting(0, "processes that read, unpack and score scans (0: one a core)")
    skip_bad: bool = setting(False, "leave out cases that cannot be read, instead of stopping")
    overwrite: bool = setting(False, "start anew: remove what this script wrote in OUT before")

    def check(self):
        """Raise InputError for a value that cannot work, before any work is done."""
        counts = ("batch_size", "epochs", "max_steps", "steps_per_epoch", "channels", "labelled_cases")
        limits = dict.fromkeys(counts, (1, 1e15))
        weights = ("smoothness", "dice_weight", "difference_weight")
        limits |= dict.fromkeys(("workers", "patience", "refine", *weights), (0, 1e15))
        limits |= dict.fromkeys(("averaging", "labelled_share", "expert_share"), (0, 1))
        limits |= {"size": (16, 4096), "spacing": (0.05, 100), "seed": (0, 2**63 - 1), "lr": (1e-9, 1000)}
        limits["width"] = 1, WIDEST
        for name, (least, largest) in limits.items():
            value = getattr(self, name, None)
            if value != getattr(type(self), name, None) and not least <= value <= largest:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {value}: must lie from {least:g} to {largest:g}")
        if self.size % 16:
            down = self.size // 16 * 16
            what = f"the networks halve it four times; take {down} or {down + 16}"
            raise InputError(f"--size {self.size}: {what}")
        if not all(isinstance(code, str) for code in getattr(self, "held_out", None) or ()):
            raise TypeError("held_out: not a list of codes")
        batch, shares = getattr(self, "batch_size", None), processes()
        if shares > 1 and batch is None:
            raise InputError("this script is one process; torchrun is for the training scripts")
        if shares > 1 and batch % shares:
            raise InputError(f"--batch-size {batch}: {shares} processes cannot share it in equal parts")


@dataclass
class TrainingSettings(Settings):
    """What the training loop takes."""

    epochs: int = setting(100, "epochs; one is `steps_per_epoch` steps, however many labels there are")
    steps_per_epoch: int = setting(200, "optimiser steps between two validations")
    max_steps: int = setting(None, "stop each network after so many steps in all; overrides --epochs")
    batch_size: int = setting(16, "slices (segmentation) or pairs of slices (registration) a step")
    lr: float = setting(1e-3, "learning rate of Adam")
    labelled_phases: str = LABELLED_PHASES
    labelled_cases: int = LABELLED_CASES
    held_out: list = setting(
        None, "labelled Training patients to validate on (default: those that the run began with; at first "
        "none where Validation has cases of vendors with training labels, else a fifth, chosen by seed)",
        type=str, nargs="+", metavar="CODE")
    augment: bool = setting(False, "a random transform for every sample (`augment.py`)")
    averaging: float = setting(0.0, "decay of the average of the weights that is validated and kept; 0: none")
    patience: int = setting(10, "lr falls to a tenth after more epochs than this without a lower val_loss")
    precision: str = setting(
        "auto", "what a step's convolutions compute in; auto: bfloat16 on cards made for it, else float32; "
        "processors with AVX512_BF16 are faster in bfloat16, others many times slower",
        choices=("auto", "float32", "bfloat16"))
    profile: bool = setting(False, "write a trace of a few steps to the run's folder, print what takes time")

    @property
    def total_steps(self):
        """Optimiser steps of a finished run."""
        return self.max_steps or self.epochs * self.steps_per_epoch


@dataclass
class RegistrationSettings(TrainingSettings):
    """`train_registration.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "augment": True, "averaging": 0.998, "dice_weight": 0.5,
                        "difference_weight": 20.0, "guided": True, "turned": True}
    similarity: str = setting("mse", "image term of the loss", choices=("mse", "ncc"))
    smoothness: float = setting(0.01, "weight of the velocity's diffusion (1.0 goes with ncc)")
    dice_weight: float = setting(0.05, "weight of the labels' overlap where both slices have expert labels")
    difference_weight: float = setting(0.0, "weight of the labels' squared difference, in the same slices")
    width: int = setting(1, "times VoxelMorph's channels; 2 carries labels better, in three times the time")
    guided: bool = setting(False, "the labels of the moving slice, where known, are an input of the network")
    turned: bool = setting(False, "carry labels by the mean velocity of a pair and of it turned by 180 deg")
    labelled_share: float = setting(0.5, "share of pairs that are ED and ES, where both have expert labels")


@dataclass
class PropagationSettings(Settings):
    """`propagate_labels.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "trust": True, "refine": 10}
    REMADE: ClassVar = True
    trust: bool = setting(False, "fuse ED's and ES's labels, weigh every pixel, check every slice (trust.py)")
    refine: int = setting(0, "steps of Adam that fit each velocity to its own two images")
    frames: str = setting("systole", "systole: ED to ES; all: diastole too", choices=("systole", "all"))
    labelled_phases: str = LABELLED_PHASES
    labelled_cases: int = LABELLED_CASES
    nifti: bool = setting(False, "write the labels as NIfTI on each case's own grid too")


@dataclass
class SegmentationSettings(TrainingSettings):
    """`train_segmentation.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "augment": True, "averaging": 0.99, "dice_weight": 1.0,
                        "expert_share": 0.5}
    expert_share: float = setting(0.0, "share of slices drawn that are the expert's; 0: all as likely")
    dice_weight: float = setting(0.0, "weight of the soft Dice loss beside the cross-entropy")
    labels: str = setting("both", "labels to train on", choices=("original", "propagated", "both"))
    channels: int = setting(32, "channels of the U-Net's first level")


@dataclass
class EvaluationSettings(Settings):
    """`evaluate.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "mirrored": True}
    data: Path = setting(None, "dataset to score, the run's own or another, in the layout of M&Ms or ACDC")
    predict: tuple = setting((), "segment these NIfTI files, or those in these folders; not with --data",
                             type=Path, nargs="+", metavar="PATH")
    channels: int = setting(32, "channels of the U-Net's first level")
    split: str = setting("Testing", "cases to score", choices=("Testing", "Validation", "Training"))
    mirrored: bool = setting(False, "average the predictions of four mirror images of each slice")
    all_frames: bool = setting(False, "predict every frame, not ED and ES alone")
    largest_component: bool = setting(False, "score each region's largest component too; --predict: write it")
    view: tuple = setting((), "show this case in the report too (repeatable)", type=str, action="append",
                          metavar="CODE")

    def check(self):
        """Raise InputError for a value that cannot work, before any work is done."""
        super().check()
        if bool(self.predict) == (self.data is not None):
            raise InputError("give either --data (a dataset to score) or --predict (scans to segment)")


# what later scripts take from earlier ones
SHARED = ("size", "spacing", "crop", "seed", "recipe", "labelled_phases", "labelled_cases", "channels",
          "skip_bad")
# a matter of this call, never taken
HERE = ("data", "out", "cache", "device", "workers", "overwrite", "labels", "profile")
BUDGET = ("epochs", "max_steps", "nifti", "skip_bad")  # taken, but a typed one may differ: the run goes on


def parse(kind, argv, description, own=(), earlier=()):
    """Settings of class `kind` from the command line and from what OUT holds.

    own: this script's folders below OUT. A run in them is gone on with: words that are not typed are its
    words, and a typed one that contradicts it is an InputError (unless --overwrite). One of them that this
    call does not write to gives its words, too, but typed ones may differ, unless they are SHARED or name the
    patients to validate on. earlier: folders of the scripts before it, which give what is SHARED, such as
    size and spacing, in the same way; where results are REMADE by another recipe than that of the run in
    `own`, what the recipes differ in is the new one's.
    """
    typed = vars(_command_line(kind, description, earlier).parse_args(argv))
    if "held_out" in typed:
        typed["held_out"] = sorted(set(typed["held_out"]))  # as runs note them
    settings = kind(**typed)
    known = dict.fromkeys(typed, "")  # name: the folder that gave its value
    labels = getattr(settings, "labels", "both")  # of the two U-Nets this call may train one
    written = [folder for folder in own if labels in ("both", Path(folder).name)]
    others = [folder for folder in own if folder not in written]
    for folder in (*written, *others, *earlier):
        if folder in written and settings.overwrite:
            continue
        stored = _stored(settings.out / folder)
        if folder in earlier:
            stored = {name: value for name, value in stored.items() if name in SHARED}
        elif stored and not kind.REMADE:  # a setting that there was not then is off, whatever the recipe
            stored = {**vars(kind()), **stored}
        if folder in others:  # what is typed may differ there
            stored.pop("skip_bad", None)  # that of the registration counts
            same = SHARED if stored.get("held_out") is None else (*SHARED, "held_out")
            stored = {name: value for name, value in stored.items() if name in same or name not in known}
        if "epochs" in typed:  # not to be overridden by a --max-steps of then
            stored.pop("max_steps", None)
        recipe = settings.recipe
        _merge(settings, known, stored, settings.out / folder, folder in written)
        if kind.REMADE and folder in earlier and settings.recipe != recipe:
            for name in (name for name in kind.STRONG if known.get(name) and name not in SHARED):
                del known[name]
                setattr(settings, name, getattr(kind, name))
    if settings.recipe == "strong":
        for name, value in kind.STRONG.items():
            if name not in known:
                setattr(settings, name, value)

    if settings.cache is None:
        settings.cache = settings.out.absolute().parent / "cache"
    try:
        settings.check()
    except TypeError as error:  # no typed word can be of the wrong type
        raise InputError(f"{settings.out}: a config.json there makes no sense ({error})") from error
    for flag, folder in (("--out", settings.out), ("--cache", settings.cache)):
        folder = folder.absolute()
        place = next(each for each in (folder, *folder.parents) if each.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise InputError(f"{flag} {folder}: {place} is not a folder that can be written to")
    return settings


def _command_line(kind, description, earlier):
    """The parser made from the fields of `kind`. What is not typed leaves no trace in what it gives."""
    if earlier and description:
        shared = (name.replace("_", "-") for name in SHARED if hasattr(kind, name))
        description += f"\n\nTaken from the runs in OUT unless typed: {', '.join(shared)}"
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in dataclasses.fields(kind):
        options = dict(item.metadata)
        text = options.pop("help").replace("%", "%%")
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            text += f" (default: off{'; strong: on' if kind.STRONG.get(item.name) else ''})"
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        if item.default not in (None, ()):
            strong = f"; strong: {kind.STRONG[item.name]}" if item.name in kind.STRONG else ""
            text += f" (default: {item.default}{strong})"
        elif not (options.get("required") or "default:" in text):
            text += " (default: none)"
        if "choices" not in options:
            options.setdefault("metavar", item.type.__name__.upper())
        options.setdefault("type", item.type)
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    return parser


def _stored(folder):
    """The settings of the run in a folder; none where there is no run."""
    config = folder / "config.json"
    if not config.exists():
        return {}
    stored = read_json(config)
    if not isinstance(stored.get("settings"), dict):
        raise InputError(f"{config}: not the settings of a run; {made_by(config)} --overwrite makes it anew")
    return stored["settings"]


def _merge(settings, known, stored, folder, written):
    """Take what is not yet `known` from the `stored` settings of the run in a folder; what is, whether typed
    or of another run, must not contradict them. Runs may differ in their seed: the first one counts. written:
    whether this call writes there.
    """
    for name in (item.name for item in dataclasses.fields(settings) if item.name not in HERE):
        if name not in stored:
            continue
        value, flag = getattr(settings, name), "--" + name.replace("_", "-")
        giver = known.get(name)  # None: not yet known; "": the command line
        may_differ = (*BUDGET, "seed") if giver else BUDGET
        if giver is None or (giver and settings.REMADE):
            setattr(settings, name, stored[name])
            known[name] = f" of {folder}"
        elif value != stored[name] and name not in may_differ:
            what = "leave it away, start anew with --overwrite," if written else "leave it away"
            what = "make one of them anew with --overwrite," if giver else what
            elsewhere = "choose another --out" if written or giver else "begin with it in another --out"
            pair = value, stored[name]
            here, there = (f"no {flag}" if each is None else f"{flag} {each}" for each in pair)
            what = f"{here}{giver} contradicts {there} of {folder}; {what}"
            raise InputError(f"{what} or {elsewhere}")

"""The one training loop that both networks share.

A task provides

    network         what is trained
    draw(step)      this process's share of the batch of step `step` (from 0); depends only on (seed, step)
    losses(batch)   a dict of scalar tensors: "loss" is minimised, the others are logged
    validate()      a dict of numbers: "val_loss" drives the schedule, the largest "score" picks best.pt

The loop provides Adam, the plateau schedule, mixed precision, checkpoints, resuming, the log and a clean exit
when it is interrupted.
"""

import contextlib
import dataclasses
import math
import os
import resource
import time

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from cardiac import parallel
from cardiac.checkpoint import Progress, restore, write_checkpoint
from cardiac.files import InputError, redo_command, replacing, write_bytes, write_csv
from cardiac.networks import mixed_precision
from cardiac.run import amend_config, deferred_signals

READ_EVERY = 20  # steps between two reads of the losses: each read waits for the device
SAVE_EVERY = 60  # seconds of work that a kill may cost, at most
BEST_OF_WHOLE_EPOCHS = ".best.pt"  # that of whole epochs, while a partial epoch's is best.pt
ADVICE = "last.pt is older; a lower --lr may help (with --overwrite)"


def fit(task, settings, folder, device, outcome="curves.png"):
    """Train `task.network` for `settings.total_steps` steps, resuming from `folder`/last.pt if it exists.

    Writes last.pt, best.pt and log.csv there. On the CPU a resumed run equals an uninterrupted one bit for
    bit. outcome: the file that the script writes last; it is removed when training resumes. Returns whether
    it is still to be written, in the first of several processes (`parallel.py`), which alone validates and
    writes. Raises InputError when the loss is no longer finite; last.pt is from before that.
    """
    first, total = parallel.RANK == 0, settings.total_steps
    run = Run(task, settings, folder, device)
    progress = run.progress
    if first and progress.step > total:  # config.json records what a run was trained with
        amend_config(folder, max_steps=progress.step)
    if run.finished:
        print(f"{folder}: finished at step {progress.step}; a larger --max-steps or --epochs continues it")
        return first and not (folder / outcome).exists()
    (folder / outcome).unlink(missing_ok=True)
    meter = run.begin()
    profiling = settings.profile and first
    profiler = profile_steps(folder, device, meter.bar) if profiling else contextlib.nullcontext()
    with deferred_signals() as stop_if_signalled, meter.bar, profiler:
        while not run.finished:
            if progress.step < total:  # else it had stopped within an epoch, which now ends there
                run.step()
                if profiling:
                    profiler.step()
            if progress.step % settings.steps_per_epoch == 0 or progress.step >= total:
                run.end_epoch()
            elif time.perf_counter() - meter.saved > SAVE_EVERY:
                run.save()
            if first:  # others that leave would abandon it in mid-step
                stop_if_signalled(run.save)
    row = progress.rows[-1]
    print(f"{row['samples_per_second']:.0f} samples/s in the last epoch, {row['waiting_percent']:.1f} % of "
          f"its time waiting for data, peak memory {row['memory_gb']:.1f} GB", flush=True)
    return first


class Run:
    """A network in training, with its optimiser, schedule, weight average, progress and files."""

    def __init__(self, task, settings, folder, device):
        self.task, self.settings, self.folder, self.device = task, settings, folder, device
        self.network = task.network.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, fused=True)
        self.schedule = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=settings.patience)
        self.average = WeightAverage(self.network, settings.averaging)
        names = ("network", "optimizer", "schedule", "average")  # in a checkpoint, besides the progress
        self.parts = {name: getattr(self, name) for name in names}
        self.progress = Progress()
        if (folder / "last.pt").exists():
            self.progress = restore(folder / "last.pt", device, **self.parts)
            best = folder / "best.pt"
            if self.progress.rows and not best.exists():
                what = f"missing; restore it, or {redo_command(best)} --overwrite retrains it"
                raise InputError(f"{best}: {what}")

    @property
    def finished(self):
        """Whether all steps are taken, and the last of them validated and logged."""
        rows, step = self.progress.rows, self.progress.step
        return step >= self.settings.total_steps and bool(rows) and rows[-1]["step"] == step

    def begin(self):
        """Start the clock; returns the `Meter`."""
        progress, settings = self.progress, self.settings
        if progress.step:
            print(f"{self.folder / 'last.pt'}: resuming from step {progress.step}", flush=True)
        # an epoch that --max-steps cut short is resumed as if it had not been validated
        progress.rows = [row for row in progress.rows if row["step"] % settings.steps_per_epoch == 0]
        scores = [row["score"] for row in progress.rows if not math.isnan(row["score"])]
        progress.best = max(scores, default=-math.inf)
        self.meter = Meter(progress, settings.total_steps, settings.batch_size, self.device)
        if parallel.RANK == 0 and (self.folder / BEST_OF_WHOLE_EPOCHS).exists():
            self.save()  # first: if killed in between, last.pt no longer includes the partial epoch
            os.replace(self.folder / BEST_OF_WHOLE_EPOCHS, self.folder / "best.pt")
        return self.meter

    def step(self):
        """One step of the optimiser."""
        self.network.train()
        with self.meter.waiting():
            batch = self.task.draw(self.progress.step)
        with mixed_precision(self.device, self.settings.precision):
            losses = self.task.losses(batch)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        losses = parallel.average_gradients(self.network, losses)
        self.optimizer.step()
        self.progress.step += 1
        self.average.update(self.progress.step)
        self.meter.add(losses)

    def end_epoch(self):
        """Validate, log, adapt the learning rate and save.

        If --max-steps ends a run within an epoch, the rate and best.pt of whole epochs are kept for resuming.
        """
        progress, settings = self.progress, self.settings
        whole = progress.step % settings.steps_per_epoch == 0
        epoch = math.ceil(progress.step / settings.steps_per_epoch)
        means, scores = self.meter.read(), parallel.from_first(self._validate)
        row = {"epoch": epoch, "step": progress.step, "lr": self.optimizer.param_groups[0]["lr"]}
        progress.rows.append({**row, **means, **scores, **self.meter.timing()})
        if whole:
            self.schedule.step(scores["val_loss"])
            self.meter.restart()
        best = self.folder / "best.pt"
        if scores["score"] > progress.best or not best.exists():  # NaN is not larger; at first there is none
            if parallel.RANK == 0 and not whole and len(progress.rows) > 1:
                write_bytes(self.folder / BEST_OF_WHOLE_EPOCHS, best.read_bytes())
            progress.best = max(progress.best, scores["score"])
            with self.average.applied():
                self.save("best.pt")
        if parallel.RANK == 0:
            write_csv(self.folder / "log.csv", list(progress.rows[-1]), progress.rows)
        self.meter.show(scores)
        self.save()

    def _validate(self):
        self.network.eval()
        with torch.no_grad(), self.average.applied():
            return self.task.validate()

    def save(self, name="last.pt"):
        """Write a checkpoint, only in the first process; InputError if the weights are not finite."""
        if parallel.RANK:
            return
        self.meter.read()
        if not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise InputError(f"the weights are not finite after step {self.progress.step}; {ADVICE}")
        parts = self.parts if name == "last.pt" else {"network": self.network}  # best.pt is never resumed
        state = {part: value.state_dict() for part, value in parts.items()}
        write_checkpoint(self.folder / name, {**state, "progress": dataclasses.asdict(self.progress)})
        self.meter.saved = time.perf_counter()


class WeightAverage:
    """Running average of weights and batch statistics (Polyak & Juditsky, 1992); off if decay is 0.

    The average is validated and kept as best.pt: it generalises like weights after a cut in learning rate.
    """

    def __init__(self, network, decay):
        self.network, self.decay, self.average, self._pairs = network, decay, {}, None

    def update(self, step):
        """Include the weights after `step` steps; the decay grows with them, to forget the start sooner."""
        if not self.decay:
            return
        if not self._pairs:  # the tensors themselves, which stay where they are
            current = self.network.state_dict()
            self.average = self.average or {name: value.clone() for name, value in current.items()}
            pairs = [(self.average[name], value) for name, value in current.items()]
            kinds = ([p for p in pairs if p[0].is_floating_point() == real] for real in (True, False))
            self._pairs = [list(zip(*pairs)) for pairs in kinds]
        weights, counts = self._pairs
        # one launch for all, not one per tensor
        torch._foreach_lerp_(*weights, 1 - min(self.decay, step / (step + 10)))
        if counts:
            torch._foreach_copy_(*counts)

    @contextlib.contextmanager
    def applied(self):
        """Put the average, if there is one, into the network for the block."""
        if not self.average:
            yield
            return
        current = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            yield
        finally:
            self.network.load_state_dict(current)

    def state_dict(self):
        """State for the checkpoint: {name: tensor}."""
        return self.average

    def load_state_dict(self, state):
        """From the checkpoint; ValueError if of another network."""
        if state and state.keys() != self.network.state_dict().keys():
            raise ValueError("the average is of another network")
        self.average, self._pairs = dict(state), None


class Meter:
    """Sums of the losses on the device, timing, progress bar, and detection of a loss that is not finite."""

    def __init__(self, progress, total, batch_size, device):
        self.progress, self.batch_size, self.device = progress, batch_size, device
        self.bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, mininterval=1)
        self.names, self.sums, self.scores = (), None, {}
        self.first_bad = torch.tensor(math.inf, device=device)
        self.begun = self.clock = self.epoch_clock = self.saved = time.perf_counter()
        self.first_step = self.epoch_step = progress.step
        self.waits = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # not that of a network trained before

    @contextlib.contextmanager
    def waiting(self):
        """Count the block as waiting for data."""
        begun = self._now()
        with torch.profiler.record_function("waiting for data"):
            yield
        self.waits.append((begun, self._now()))

    def _now(self):
        """Time in seconds; on a GPU, which the CPU runs ahead of, an event to be read later."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, losses):
        """Add a step's losses to the sums on the device; read them every READ_EVERY steps."""
        step = torch.full((), float(self.progress.step), device=self.device)  # no copy from the host: no wait
        self.first_bad = torch.where(losses["loss"].isfinite(), self.first_bad, self.first_bad.minimum(step))
        sums = self.progress.sums
        if self.sums is None:
            self.names, before = tuple(losses), [sums.get(name, 0.0) for name in losses]
            self.sums = torch.tensor(before, dtype=torch.float64, device=self.device)
        with torch.no_grad():  # all in one launch
            self.sums += torch.stack(list(losses.values()))
        sums["steps"] = sums.get("steps", 0) + 1
        self.bar.update()
        done = self.progress.step - self.first_step
        if done % READ_EVERY == 0:
            self.read()
            self.show({})
        if done == READ_EVERY:
            self.begun = self.clock  # the first steps are slower
        elif done == 2 * READ_EVERY and self.progress.step < self.bar.total:
            seconds, left = (self.clock - self.begun) / READ_EVERY, self.bar.total - self.progress.step
            speed, memory = self.batch_size / seconds, peak_memory(self.device) / 1e9
            self.bar.write(f"about {_duration(left * seconds / 60)} for {left} more steps, "
                           f"{speed:.0f} samples/s, peak memory {memory:.1f} GB")

    def read(self):
        """Bring the sums to `progress`; returns the means over the current epoch. Waits for the device."""
        if math.isfinite(self.first_bad.item()):
            raise InputError(f"the loss is not finite from step {int(self.first_bad.item())} on; {ADVICE}")
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now
        sums = self.progress.sums
        sums |= zip(self.names, self.sums.tolist() if self.names else ())
        return {name: value / sums["steps"] for name, value in sums.items() if name != "steps"}

    def restart(self):
        """Begin the sums of the next epoch."""
        self.names, self.sums, self.progress.sums = (), None, {}

    def timing(self):
        """Timing columns of log.csv since the last call (`seconds` in all): all that equal runs differ in."""
        now = time.perf_counter()
        seconds, steps = now - self.epoch_clock, self.progress.step - self.epoch_step
        on_gpu = self.device.type == "cuda"
        waits = (a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in self.waits)
        row = {"seconds": self.progress.seconds, "samples_per_second": steps * self.batch_size / seconds}
        row |= {"waiting_percent": 100 * sum(waits) / seconds, "memory_gb": peak_memory(self.device) / 1e9}
        self.epoch_clock, self.epoch_step, self.waits = now, self.progress.step, []
        return row

    def show(self, scores):
        """Losses of the current epoch and scores of the last validation, on the progress bar."""
        self.scores = scores or self.scores
        sums = dict(self.progress.sums)
        steps = sums.pop("steps", 1)
        shown = {name: f"{value / steps:.3f}" for name, value in sums.items()}
        self.bar.set_postfix(shown | {name: f"{value:.3f}" for name, value in self.scores.items()})


def _duration(minutes):
    """Minutes in words, with no more digits than an estimate has."""
    if minutes < 100:
        return f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    return f"{minutes / 60:.1f} hours"


def profile_steps(folder, device, bar):
    """A profiler of five steps, a few after the start; writes `folder`/trace.json and prints what takes time.

    Its `.step()` is to be called once per step. The trace is for chrome://tracing or https://ui.perfetto.dev.
    """

    def report(profiler):
        with replacing(folder / "trace.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
        order = f"self_{device.type}_time_total"
        table = profiler.key_averages().table(order, row_limit=12, max_name_column_width=40)
        bar.write(f"{table}\n{folder / 'trace.json'}: five steps, for https://ui.perfetto.dev")

    steps = torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1)
    kinds = torch.profiler.ProfilerActivity
    watched = [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]  # or it looks for a GPU
    return torch.profiler.profile(activities=watched, schedule=steps, on_trace_ready=report, acc_events=True)


def peak_memory(device):
    """Bytes at the peak: of the CUDA allocator since training began, or of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The training loop: resumed equals uninterrupted bit for bit, the schedule, and every way it can end."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import signal
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cardiac import training
from cardiac.checkpoint import Progress, load_network, read_checkpoint, write_checkpoint
from cardiac.files import InputError, read_json, write_json
from cardiac.networks import RegistrationNetwork, SegmentationNetwork
from cardiac.run import Terminated, run_folder, script
from cardiac.settings import Settings, TrainingSettings
from cardiac.slices import step_generator
from cardiac.training import fit

CPU = torch.device("cpu")
TIMING = {"seconds", "samples_per_second", "waiting_percent", "memory_gb"}


def noise(step):
    """Images and labels of a step."""
    generator = step_generator(0, step)
    images = torch.rand(2, 1, 16, 16, generator=generator)
    return images, torch.randint(4, (2, 16, 16), generator=generator)


class Task:
    """Noise to segment, with batch norm in the network.

    at: {step: function called when it is drawn}; bad: steps whose loss is NaN; val_losses, scores: {steps
    done: what validation returns}.
    """

    def __init__(self, at=None, bad=(), val_losses=None, scores=None):
        torch.manual_seed(0)
        self.network = SegmentationNetwork(1)
        self.at, self.bad, self.val_losses, self.scores, self.drawn = at or {}, bad, val_losses, scores, []

    def draw(self, step):
        self.drawn.append(step)
        if step in self.at:
            self.at[step]()
        return noise(step)

    def losses(self, batch):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.network(images), labels)
        if self.drawn[-1] in self.bad:
            loss = loss * math.nan
        return {"loss": loss, "half": loss / 2}

    def validate(self):
        assert not self.network.training
        images, labels = noise(10**6)
        loss = torch.nn.functional.cross_entropy(self.network(images), labels).item()
        step = self.drawn[-1] + 1 if self.drawn else 0
        return {
            "val_loss": self.val_losses[step] if self.val_losses else loss,
            "score": self.scores[step] if self.scores else -loss,
        }


def settings(**words):
    words = {"steps_per_epoch": 4, "max_steps": 12, "batch_size": 2, "lr": 1e-2, "patience": 1, **words}
    return TrainingSettings(**words)


def train(folder, task=None, **words):
    folder.mkdir(exist_ok=True)
    return fit(task or Task(), settings(**words), folder, CPU, outcome="done")


def without_timing(value):
    """A checkpoint with tensors as bytes and without times: equal if runs are equal bit for bit."""
    if isinstance(value, dict):
        return {key: without_timing(part) for key, part in value.items() if key not in TIMING}
    if isinstance(value, (list, tuple)):
        return [without_timing(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    return value


def log(folder):
    with open(folder / "log.csv") as file:
        return [{key: text for key, text in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def assert_equal_runs(one, other):
    for name in ("last.pt", "best.pt"):
        states = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        first, second = map(without_timing, states)
        for part in first:
            assert first[part] == second[part], f"{name}: {part}"
    assert log(one) == log(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of 12 steps in 3 epochs."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder)
    assert [row["step"] for row in log(folder)] == ["4", "8", "12"]
    return folder


def signalled(step, number):
    """A task that gets a signal in the middle of a step."""
    return Task({step: lambda: signal.raise_signal(number)})


# -------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("step", [0, 2, 3, 5, 10])
def test_after_ctrl_c_at_any_step_the_run_ends_as_if_nothing_had_been(tmp_path, whole, step):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, signalled(step, signal.SIGINT))
    assert read_checkpoint(tmp_path / "last.pt", CPU)["progress"]["step"] == step + 1  # finished, then saved
    task = Task()
    assert train(tmp_path, task)
    assert task.drawn == list(range(step + 1, 12))
    assert_equal_runs(tmp_path, whole)


def test_interrupted_again_and_again(tmp_path, whole):
    for step in (1, 4, 6, 9):
        with pytest.raises(Terminated):
            train(tmp_path, signalled(step, signal.SIGTERM))
    assert train(tmp_path)
    assert_equal_runs(tmp_path, whole)


class Killed(BaseException):
    """As if by SIGKILL: nothing is saved on the way out."""


def killed(*_):
    raise Killed


WAYS_TO_STOP = {
    Killed: killed,
    KeyboardInterrupt: lambda: signal.raise_signal(signal.SIGINT),
    Terminated: lambda: signal.raise_signal(signal.SIGTERM),
}


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from(list(WAYS_TO_STOP))), min_size=1, max_size=3),
    st.sampled_from([0.0, 1e9]),
)
def test_stopped_at_any_steps_in_any_way_the_run_ends_as_if_nothing_had_been(
    tmp_path_factory, whole, stops, every
):
    """every: seconds between two checkpoints within an epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", every)
        for step, how in stops:  # at a step already taken, the run just finishes
            with contextlib.suppress(how):
                train(folder, Task({step: WAYS_TO_STOP[how]}))
        train(folder)
    assert_equal_runs(folder, whole)


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 11])
def test_max_steps_raised_goes_on_as_if_it_had_been_so_from_the_start(tmp_path, whole, steps):
    train(tmp_path, max_steps=steps)
    (tmp_path / "done").touch()
    assert (tmp_path / "best.pt").exists()
    assert log(tmp_path)[-1]["step"] == str(steps)
    assert train(tmp_path)
    assert not (tmp_path / "done").exists(), "the outcome of the shorter run is out of date"
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(("stopped", "wanted"), [(2, 2), (2, 1), (6, 6), (6, 5)])
def test_max_steps_ends_a_run_that_was_interrupted_there_or_beyond(tmp_path, whole, stopped, wanted):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", signalled(stopped - 1, signal.SIGINT))
    task, config = Task(), tmp_path / "parts" / "config.json"
    write_json(config, {"settings": {"max_steps": wanted}, "dataset": "A"})
    assert train(tmp_path / "parts", task, max_steps=wanted)
    assert task.drawn == []
    assert read_json(config) == {"settings": {"max_steps": stopped}, "dataset": "A"}, "as it was trained"
    train(tmp_path / "straight", max_steps=stopped)
    assert_equal_runs(tmp_path / "parts", tmp_path / "straight")
    train(tmp_path / "parts")
    assert_equal_runs(tmp_path / "parts", whole)


def test_a_signal_while_a_run_is_ended_is_not_lost(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, signalled(1, signal.SIGINT))
    task, validate = Task(), Task.validate
    task.validate = lambda: (signal.raise_signal(signal.SIGINT), validate(task))[1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, task, max_steps=2)
    assert log(tmp_path)[-1]["step"] == "2"


@pytest.mark.parametrize("steps", [2, 6])
def test_a_good_score_where_max_steps_cut_an_epoch_is_forgotten_when_training_goes_on(tmp_path, steps):
    scores = {2: 0.9, 4: 0.2, 6: 0.9, 8: 0.1 * steps}  # in the end the first or the second epoch is best
    for folder, stops in (("whole", [8]), ("parts", [steps, 8])):
        for stop in stops:
            train(tmp_path / folder, Task(scores=scores), max_steps=stop)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


def test_the_last_part_of_an_epoch_can_be_the_best(tmp_path):
    scores = {4: 0.2, 6: 0.9, 8: 0.5}
    train(tmp_path, Task(scores=scores), max_steps=6)
    last, best = (read_checkpoint(tmp_path / name, CPU) for name in ("last.pt", "best.pt"))
    assert best["progress"]["step"] == 6
    assert last["progress"]["best"] == 0.9
    with pytest.raises(Killed):
        train(tmp_path, Task({6: killed}, scores=scores), max_steps=8)
    last, best = (read_checkpoint(tmp_path / name, CPU) for name in ("last.pt", "best.pt"))
    assert (best["progress"]["step"], last["progress"]["best"]) == (4, 0.2), "the two belong together"
    train(tmp_path, Task(scores=scores), max_steps=8)
    assert read_checkpoint(tmp_path / "best.pt", CPU)["progress"]["step"] == 8
    train(tmp_path / "worse", Task(scores=scores | {6: 0.1}), max_steps=6)
    assert read_checkpoint(tmp_path / "worse" / "best.pt", CPU)["progress"]["step"] == 4


@pytest.mark.parametrize("place", ["save", "replace"])
def test_a_kill_where_a_longer_run_begins_leaves_best_and_last_of_one_mind(tmp_path, monkeypatch, place):
    scores = {4: 0.5, 6: 0.9, 0: 0.9}  # 0: of a task that validates before it has drawn anything
    train(tmp_path, Task(scores=scores), max_steps=6)
    replace = os.replace
    with monkeypatch.context() as patch:
        if place == "save":
            patch.setattr(training.Run, "save", killed)
        else:
            kept = tmp_path / training.BEST_OF_WHOLE_EPOCHS
            patch.setattr(os, "replace", lambda a, b: killed() if a == kept else replace(a, b))
        with pytest.raises(Killed):
            train(tmp_path, Task(scores=scores), max_steps=12)
    train(tmp_path, Task(scores=scores), max_steps=6)
    last, best = (read_checkpoint(tmp_path / name, CPU) for name in ("last.pt", "best.pt"))
    assert (last["progress"]["best"], best["progress"]["step"]) == (0.9, 6)


@pytest.mark.parametrize("every", [0, 1e9])
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole, monkeypatch, every):
    monkeypatch.setattr(training, "SAVE_EVERY", every)  # seconds; epochs end with a checkpoint anyway

    def crash():
        raise OSError("as if killed")

    with pytest.raises(OSError, match="as if killed"):
        train(tmp_path, Task({6: crash}))
    task = Task()
    assert train(tmp_path, task)
    assert task.drawn[0] == (6 if every == 0 else 4)
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize("step", [1, 6])
def test_averaged_weights_are_resumed_too(tmp_path, step):
    train(tmp_path / "whole", averaging=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", signalled(step, signal.SIGINT), averaging=0.9)
    train(tmp_path / "parts", averaging=0.9)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


def test_steps_in_bfloat16_leave_weights_and_validation_in_float32_and_are_resumed_too(tmp_path):
    task, kinds = Task(), set()
    task.network.down[1].register_forward_hook(lambda module, _, out: kinds.add((module.training, out.dtype)))
    train(tmp_path / "whole", task, precision="bfloat16")
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    weights = read_checkpoint(tmp_path / "whole" / "last.pt", CPU)["network"].values()
    assert {each.dtype for each in weights} == {torch.float32, torch.int64}  # int64: batch norm's counts
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", signalled(6, signal.SIGINT), precision="bfloat16")
    train(tmp_path / "parts", precision="bfloat16")
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


def test_another_seed_of_the_network_would_show(tmp_path, whole):
    task = Task()
    with torch.no_grad():
        next(task.network.parameters()).mul_(1 + 1e-6)
    train(tmp_path, task)
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path, whole)


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    assert train(tmp_path, max_steps=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    task = Task()
    assert train(tmp_path, task, max_steps=4), "the outcome is still to be made"
    (tmp_path / "done").touch()
    assert not train(tmp_path, task, max_steps=4)
    assert task.drawn == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "done"} == before
    assert "finished at step 4" in capsys.readouterr().out


def test_a_second_ctrl_c_leaves_at_once_without_saving(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    task = Task({2: twice})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, task)
    assert not (tmp_path / "last.pt").exists()


def test_the_handlers_of_before_are_back_after_training(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path, max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


ENDS = (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")


@pytest.mark.parametrize(("number", "code", "word"), ENDS)
@pytest.mark.parametrize("argv", [[], ["--overwrite"]])
def test_a_script_that_is_interrupted_says_how_to_go_on(tmp_path, capsys, number, code, word, argv):
    def train_in_a_run(argv):
        words = Settings(out=tmp_path, overwrite="--overwrite" in argv)
        with run_folder(words, "registration", [SimpleNamespace(code="A", split="Training")]) as folder:
            train(folder, signalled(1, number))

    main = script(train_in_a_run)
    assert main(argv) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{word}; the same command resumes from here" in line
    assert ("without --overwrite" in line) == bool(argv), "with it the run would be removed"
    assert read_checkpoint(tmp_path / "registration" / "last.pt", CPU)["progress"]["step"] == 2


def test_a_script_that_is_interrupted_before_it_removed_anything_needs_its_overwrite_still(capsys):
    assert script(lambda argv: signal.raise_signal(signal.SIGINT))(["--overwrite"]) == 130
    assert "without --overwrite" not in capsys.readouterr().err


# ------------------------------------------------------------------------------- steps, schedule, best, log


def test_max_steps_overrides_epochs(tmp_path):
    assert TrainingSettings(epochs=3, steps_per_epoch=5).total_steps == 15
    for steps, folder in ((2, "less"), (7, "more")):
        task = Task()
        train(tmp_path / folder, task, epochs=1, max_steps=steps)
        assert task.drawn == list(range(steps))


def test_the_learning_rate_falls_to_a_tenth_after_epochs_without_a_lower_validation_loss(tmp_path):
    losses = {4: 3.0, 8: 2.0, 12: 2.5, 16: 2.5, 20: 2.5, 24: 2.5}
    train(tmp_path, Task(val_losses=losses), max_steps=24, patience=1)
    rates = [float(row["lr"]) for row in log(tmp_path)]
    assert rates == pytest.approx([1e-2] * 4 + [1e-3] * 2)


@pytest.mark.parametrize("pause", [8, 13])
def test_the_schedule_is_resumed_too(tmp_path, pause):
    losses = dict.fromkeys(range(1, 17), 2.0)
    for folder, stops in (("whole", [16]), ("parts", [pause, 16])):
        for stop in stops:
            train(tmp_path / folder, Task(val_losses=losses), max_steps=stop)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("pause", [8, 10])
def test_what_was_best_stays_so_where_a_run_goes_on(tmp_path, pause):
    for stop in (pause, 12):
        train(tmp_path, Task(scores={4: 0.2, 8: 0.7, 10: 0.3, 12: 0.5}), max_steps=stop)
    best = read_checkpoint(tmp_path / "best.pt", CPU)["progress"]
    assert (best["step"], best["best"]) == (8, 0.7)


def test_best_holds_the_weights_of_the_best_score_and_last_those_of_the_end(tmp_path):
    train(tmp_path, Task(scores={4: 0.2, 8: 0.7, 12: 0.5}))
    best, last = (read_checkpoint(tmp_path / name, CPU)["progress"] for name in ("best.pt", "last.pt"))
    assert (best["step"], best["best"]) == (8, 0.7)
    assert (last["step"], last["best"]) == (12, 0.7)
    network = SegmentationNetwork(1)
    assert load_network(network, tmp_path / "best.pt", CPU).step == 8
    assert not network.training
    train(tmp_path / "eight", max_steps=8)
    assert network.state_dict().keys() == Task().network.state_dict().keys()
    expected = SegmentationNetwork(1)
    load_network(expected, tmp_path / "eight" / "last.pt", CPU)
    for one, other in zip(network.state_dict().values(), expected.state_dict().values()):
        assert torch.equal(one, other)


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path):
    train(tmp_path, averaging=0.5, max_steps=4)
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert without_timing(best["network"]) == without_timing(last["average"])
    assert without_timing(best["network"]) != without_timing(last["network"])
    task = Task()
    load_network(task.network, tmp_path / "best.pt", CPU)
    task.drawn = [3]
    assert task.validate()["score"] == pytest.approx(best["progress"]["best"], abs=1e-6)


def test_an_average_forgets_its_start_and_keeps_counts_as_they_are():
    network = torch.nn.BatchNorm1d(1)
    average = training.WeightAverage(network, 0.5)
    expected = None
    for step in range(1, 30):
        value = float(step % 3)
        torch.nn.init.constant_(network.weight, value)
        network.num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.5, step / (step + 10))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    with average.applied():
        assert network.weight.item() == pytest.approx(expected, rel=1e-5)
        assert network.num_batches_tracked.item() == 29
    assert network.weight.item() == 29 % 3


def test_the_log_has_a_row_an_epoch_with_means_of_the_losses(tmp_path, whole):
    rows = log(whole)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"epoch", "step", "lr", "loss", "half", "val_loss", "score"} == set(rows[0])
    for row in rows:
        assert float(row["half"]) == pytest.approx(float(row["loss"]) / 2, abs=2e-6)
    losses = []

    class Recorder(Task):
        def losses(self, batch):
            found = super().losses(batch)
            losses.append(found["loss"].item())
            return found

    train(tmp_path, Recorder(), max_steps=4)
    assert float(rows[0]["loss"]) == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_a_trace_of_a_few_steps_changes_nothing_and_is_mentioned(tmp_path, whole, capsys):
    train(tmp_path, profile=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith("ProfilerStep#")]
    assert len(steps) == 5
    assert any(event.get("name") == "waiting for data" for event in events)
    printed = "".join(capsys.readouterr())
    assert "trace.json" in printed
    assert "convolution" in printed
    assert_equal_runs(tmp_path, whole)


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(("bad", "kept"), [({5}, 4), ({7}, 4), ({8, 9}, 8)])
def test_a_loss_that_is_not_finite_stops_with_the_step_named_and_keeps_last(tmp_path, bad, kept):
    with pytest.raises(InputError, match=rf"not finite from step {min(bad) + 1} on"):
        train(tmp_path, Task(bad=bad))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["progress"]["step"] == kept
    assert all(value.isfinite().all() for value in state["network"].values())
    train(tmp_path / "good", max_steps=kept)
    good = torch.load(tmp_path / "good" / "last.pt", weights_only=True)
    assert without_timing(state["network"]) == without_timing(good["network"])


def test_a_score_that_is_not_defined_still_leaves_a_best_checkpoint(tmp_path):
    train(tmp_path / "run", Task(scores={4: math.nan, 8: math.nan, 12: math.nan}))
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["progress"]["step"] == 4
    train(tmp_path / "other", Task(scores={4: math.nan, 8: 0.1, 12: math.nan}))
    best = torch.load(tmp_path / "other" / "best.pt", weights_only=True)
    assert (best["progress"]["step"], best["progress"]["best"]) == (8, 0.1)


@pytest.mark.parametrize("one", [False, True])
def test_weights_that_are_not_finite_are_not_kept_even_where_the_loss_still_is(tmp_path, one):
    class Root(Task):
        def losses(self, batch):
            loss = super().losses(batch)["loss"]
            source = next(self.network.parameters()).flatten()[0] if one else loss  # one weight, or all
            return {"loss": loss + (0 * source).sqrt() if self.drawn[-1] == 7 else loss}

    with pytest.raises(InputError, match="weights are not finite after step 8;"):
        train(tmp_path, Root())
    assert read_checkpoint(tmp_path / "last.pt", CPU)["progress"]["step"] == 4


def hostile():
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    progress = dataclasses.asdict(Progress())
    good = {"network": SegmentationNetwork(1).state_dict(), "progress": progress}
    states = {
        "code": Evil(),
        "list": [1, 2],
        "no network": {"progress": progress},
        "progress is a list": {**good, "progress": [1]},
        "progress has other fields": {**good, "progress": {"phase": 1}},
        "step is a word": {**good, "progress": {"step": "many"}},
        "no optimizer": good,
        "weights are words": {**good, "network": dict.fromkeys(good["network"], "x")},
        "weights are a number": {**good, "network": 3},
        "wider": {**good, "network": SegmentationNetwork(2).state_dict()},
        "other network": {**good, "network": RegistrationNetwork().state_dict()},
    }
    yield from states.items()
    yield from {"empty": b"", "text": b"weights", "zip": b"PK\x03\x04"}.items()


@pytest.mark.parametrize(("name", "state"), [pytest.param(*pair, id=pair[0]) for pair in hostile()])
def test_a_checkpoint_of_a_stranger_is_one_clear_line_and_not_executed(tmp_path, monkeypatch, name, state):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    with pytest.raises(InputError, match="last.pt: ") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert not (tmp_path / "executed").exists()
    if name != "no optimizer":  # which only training needs
        with pytest.raises(InputError):
            load_network(SegmentationNetwork(1), path, CPU)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, whole, share):
    content = (whole / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="not a checkpoint"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("run", "script"),
    [
        ("registration", "train_registration.py"),
        ("segmentation/original", "train_segmentation.py --labels original"),
    ],
)
def test_without_a_checkpoint_the_script_to_run_before_is_named(tmp_path, run, script):
    with pytest.raises(InputError, match=f"run {script} first"):
        load_network(SegmentationNetwork(1), tmp_path / run / "best.pt", CPU)


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    write_checkpoint(tmp_path / "last.pt", {"a": torch.zeros(3)})
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(Exception):  # noqa: B017, PT011
        write_checkpoint(tmp_path / "last.pt", {"a": lambda: None})
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_holds_plain_values(whole):
    torch.load(whole / "last.pt", weights_only=True)  # anything else is refused

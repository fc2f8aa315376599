"""The strong recipe: its settings reach the runs, averaged weights are kept, and it resumes bit for bit."""

import json
from dataclasses import replace

import pytest
import torch

import propagate_labels
import train_registration
import train_segmentation
from cardiac import propagation
from cardiac.cache import open_cache
from cardiac.checkpoint import weights_digest
from cardiac.files import InputError, read_json
from cardiac.losses import IGNORED, soft_dice_loss
from cardiac.networks import RegistrationNetwork, SegmentationNetwork, Turned
from cardiac.settings import RegistrationSettings
from cardiac.slices import SliceStore
from cardiac.training import WeightAverage

GRID = "--size 32 --spacing 2 --workers 1 --device cpu --recipe strong --steps-per-epoch 2 --batch-size 4"
SCRIPTS = {
    "registration": (train_registration, ""),
    "segmentation/original": (train_segmentation, "--channels 2"),
}


@pytest.mark.parametrize("place", SCRIPTS)
def test_strong_runs_resume_bit_for_bit(place, tiny_data, tmp_path):
    script, words = SCRIPTS[place]
    words = [*GRID.split(), *words.split(), *(["--labels", "original"] if "segmentation" in place else [])]

    def trained(out, *limits):
        """The checkpoints last.pt and best.pt of a run that was stopped at these steps."""
        for steps in limits:
            command = ["--data", str(tiny_data), "--out", str(tmp_path / out), *words]
            assert script.main([*command, "--max-steps", str(steps)]) == 0
        names = ("last.pt", "best.pt")
        return (torch.load(tmp_path / out / place / name, weights_only=True) for name in names)

    (once, best), (twice, _) = trained("once", 4), trained("twice", 2, 4)
    for part in ("network", "average"):
        assert once[part].keys() == twice[part].keys()
        assert all(torch.equal(once[part][name], twice[part][name]) for name in once[part])
    settings = read_json(tmp_path / "once" / place / "config.json")["settings"]
    assert settings["augment"] is True
    assert settings["averaging"] > 0
    then, _ = trained("until", best["progress"]["step"])
    assert all(torch.equal(best["network"][name], then["average"][name]) for name in then["average"])
    assert any(not torch.equal(once["network"][name], once["average"][name]) for name in once["average"])


def test_labels_are_carried_and_scored_by_a_pair_and_the_turned_pair(tiny_data, tmp_path, monkeypatch):
    out, seen, score = tmp_path / "run", [], propagation.score_registration

    def watched(network, *others):
        seen.append(network)
        return score(network, *others)

    monkeypatch.setattr(propagation, "score_registration", watched)
    command = ["--data", str(tiny_data), "--out", str(out), *GRID.split(), "--max-steps", "2"]
    assert train_registration.main(command) == 0
    network, progress = propagation.load_registration(out, torch.device("cpu"))
    assert progress.step == 2
    assert [type(each) for each in (network, *seen)] == [Turned, Turned]
    assert not network.training
    before, config = weights_digest(network), read_json(out / "registration" / "config.json")
    del config["settings"]["turned"]  # an older run
    (out / "registration" / "config.json").write_text(json.dumps(config))
    network, _ = propagation.load_registration(out, torch.device("cpu"))
    assert type(network) is RegistrationNetwork
    assert weights_digest(network) != before, "labels.h5 is identified by it"


def test_a_wider_registration_is_read_back_as_wide(tiny_data, tmp_path):
    out = tmp_path / "run"
    command = ["--data", str(tiny_data), "--out", str(out), *GRID.split(), "--width", "2", "--max-steps", "1"]
    assert train_registration.main(command) == 0
    path = out / "registration" / "config.json"
    config = read_json(path)
    network, _ = propagation.load_registration(out, torch.device("cpu"))
    assert network.network.velocity.in_channels == 32
    for width, error in ((1, "another architecture"), ("2", "invalid width 2"), (10**9, "invalid width")):
        config["settings"]["width"] = width
        path.write_text(json.dumps(config))
        with pytest.raises(InputError, match=error):
            propagation.load_registration(out, torch.device("cpu"))


def test_refinement_is_a_word_of_the_propagation_and_labels_are_told_by_it(tiny_data, tmp_path, capsys):
    common = ["--data", str(tiny_data), "--out", str(tmp_path / "run")]
    assert train_registration.main([*common, *GRID.split(), "--max-steps", "2"]) == 0
    path, found = tmp_path / "run" / "propagation" / "labels.h5", {}
    for steps in (0, 2):
        words = [*common, "--workers", "1", "--device", "cpu", "--refine", str(steps)]
        if found:
            capsys.readouterr()
            assert propagate_labels.main(words) == 2
            assert "--refine 2 contradicts --refine 0" in capsys.readouterr().err
        assert propagate_labels.main([*words, "--overwrite"]) == 0
        found[steps] = propagation.made_from(path), propagation.Propagated.read(path).confidence
    assert "refined by 2 steps" in capsys.readouterr().out
    assert found[0][0] != found[2][0]
    assert (found[0][1] != found[2][1]).any()


def test_average_follows_the_weights_and_is_put_back():
    network = SegmentationNetwork(1)
    average = WeightAverage(network, 0.5)
    weight = network.classify.weight
    expected = None
    for step, value in enumerate((0.0, 1.0, 5.0), start=1):
        with torch.no_grad():
            weight.fill_(value)
        average.update(step)
        decay = min(0.5, step / (step + 10))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    with average.applied():
        assert torch.allclose(weight, torch.full_like(weight, expected))
    assert (weight == 5).all()


def test_no_decay_keeps_nothing():
    average = WeightAverage(SegmentationNetwork(1), 0.0)
    average.update(1)
    assert average.state_dict() == {}
    with average.applied():
        pass


def test_soft_dice_of_certain_logits():
    labels = torch.tensor([[[0, 1, 2], [3, 1, 2], [3, 0, IGNORED]]], dtype=torch.uint8)
    right = torch.nn.functional.one_hot(labels.long().clamp(max=3), 4).permute(0, 3, 1, 2) * 50.0
    assert soft_dice_loss(right, labels) < 1e-6
    assert soft_dice_loss(right.roll(1, 1), labels) > 0.99
    anything = right.clone()
    anything[..., 2, 2] = torch.tensor([0.0, 90, 0, 0])[None]
    assert torch.equal(soft_dice_loss(anything, labels), soft_dice_loss(right, labels))


def test_the_registration_is_validated_by_the_labels_too_as_it_is_trained(tiny_data, tmp_path):
    """The image term alone rises while the labels still improve, and would cut the learning rate too soon."""
    words = {"data": tiny_data, "cache": tmp_path, "size": 32, "spacing": 2.0, "workers": 1}
    cache = open_cache(RegistrationSettings(**words))
    cpu = torch.device("cpu")
    stores = [SliceStore(cache, cache.split(name), cpu) for name in ("Training", "Validation")]
    image, paper, strong = (
        train_registration.Registration(RegistrationSettings(**words, dice_weight=weight), *stores).validate()
        for weight in (0.0, 0.05, 0.5)
    )
    assert 0 < image["val_dice"] == paper["val_dice"] < 1
    for found, weight in ((paper, 0.05), (strong, 0.5)):
        expected = image["val_loss"] + weight * (1 - found["val_dice"])
        assert found["val_loss"] == pytest.approx(expected, rel=1e-6)
    case = replace(stores[1].cases[0], withheld=(stores[1].cases[0].es,))
    stores[1].cases = [case]
    alone = train_registration.Registration(RegistrationSettings(**words), *stores).validate()
    assert set(alone) == {"val_loss", "score"}
    assert alone["score"] == -alone["val_loss"]

"""The command line: defaults in --help, what later scripts take from the run, contradictions, bad options."""

import dataclasses
import json
import types

import pytest

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import check, demo, phantom
from cardiac import settings as settings_module
from cardiac.files import InputError
from cardiac.run import run_folder
from cardiac.settings import (
    EvaluationSettings,
    PropagationSettings,
    RegistrationSettings,
    SegmentationSettings,
    parse,
)

SCRIPTS = {
    train_registration: RegistrationSettings,
    propagate_labels: PropagationSettings,
    train_segmentation: SegmentationSettings,
    evaluate: EvaluationSettings,
}
KINDS = pytest.mark.parametrize("kind", SCRIPTS.values(), ids=lambda kind: kind.__name__)
MODULES = pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)


@pytest.mark.parametrize(("module", "kind"), SCRIPTS.items(), ids=lambda value: value.__name__)
def test_help_shows_every_setting_with_its_default(module, kind, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(kind):
        assert f"--{item.name.replace('_', '-')}" in text
        if item.default not in (None, ()) and item.default is not False:
            assert f"(default: {item.default}" in text, item.name
        for choice in item.metadata.get("choices", ()):
            assert choice in text
    off = sum(item.default is False for item in dataclasses.fields(kind))
    assert text.count("(default: off") == off
    required = sum(item.metadata.get("required", False) for item in dataclasses.fields(kind))
    assert text.count("(default: ") == len(dataclasses.fields(kind)) - required


def test_the_words_of_the_design_are_there():
    every = "data out cache device size spacing seed recipe overwrite"
    expected = {
        RegistrationSettings: f"{every} epochs max_steps batch_size lr",
        PropagationSettings: f"{every} frames nifti",
        SegmentationSettings: f"{every} epochs max_steps batch_size lr labels channels",
        EvaluationSettings: f"{every} split all_frames",
    }
    for kind, names in expected.items():
        assert set(names.split()) <= {item.name for item in dataclasses.fields(kind)}


@KINDS
def test_nothing_typed_gives_the_defaults_and_the_cache_beside_out(kind, tmp_path):
    found = parse(kind, ["--data", "D", "--out", str(tmp_path / "runs" / "a")], "")
    for item in dataclasses.fields(kind):
        if item.name not in ("data", "out", "cache"):
            assert getattr(found, item.name) == item.default, item.name
    assert found.cache == tmp_path / "runs" / "cache"


def test_a_typed_word_is_taken_in_its_type(tmp_path):
    words = ["--size=64", "--spacing=2", "--lr=3e-4", "--max-steps=7", "--similarity=ncc", "--skip-bad"]
    found = parse(RegistrationSettings, ["--data", "D", *words], "")
    assert (found.size, found.spacing, found.lr, found.max_steps) == (64, 2.0, 3e-4, 7)
    assert (found.similarity, found.skip_bad) == ("ncc", True)
    assert isinstance(found.spacing, float)


# ------------------------------------------------------------------------------------- settings of a run


def stored_run(out, folder, kind, **words):
    """Make the folder of a run with these settings; returns them."""
    settings = kind(out=out, **words)
    with run_folder(settings, folder, []):
        return settings


def later(kind, out, *words, **options):
    return parse(kind, ["--data", "D", "--out", str(out), *words], "", **options)


@pytest.mark.parametrize("kind", [PropagationSettings, SegmentationSettings])
def test_later_scripts_take_size_spacing_recipe_and_seed_from_the_registration(tmp_path, kind):
    words = {"size": 64, "spacing": 2.0, "seed": 3, "lr": 0.5, "max_steps": 9}
    stored_run(tmp_path, "registration", RegistrationSettings, **words)
    found = later(kind, tmp_path, earlier=["registration"])
    assert (found.size, found.spacing, found.seed) == (64, 2.0, 3)
    assert getattr(found, "lr", 1e-3) == 1e-3, "the learning rate of another network is not taken"
    assert getattr(found, "max_steps", None) is None


def test_evaluation_takes_channels_from_the_segmentation(tmp_path):
    stored_run(tmp_path, "segmentation/propagated", SegmentationSettings, channels=8, size=64)
    found = later(EvaluationSettings, tmp_path, earlier=["segmentation/original", "segmentation/propagated"])
    assert (found.channels, found.size) == (8, 64)


def test_a_run_gone_on_with_keeps_all_its_words(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings, size=64, lr=0.5, similarity="ncc", max_steps=9)
    found = later(RegistrationSettings, tmp_path, own=["registration"])
    assert (found.size, found.lr, found.similarity, found.max_steps) == (64, 0.5, "ncc", 9)
    assert later(RegistrationSettings, tmp_path, "--max-steps", "20", own=["registration"]).total_steps == 20
    longer = later(RegistrationSettings, tmp_path, "--epochs", "2", own=["registration"])
    assert longer.total_steps == 2 * longer.steps_per_epoch, "not overridden by the run's steps"


@pytest.mark.parametrize(
    ("word", "value", "there"),
    [("--size", "64", "48"), ("--spacing", "1.5", "2.0"), ("--seed", "1", "0"), ("--lr", "0.1", "0.001")],
)
def test_a_contradiction_names_both_values_and_the_run(tmp_path, word, value, there):
    stored_run(tmp_path, "registration", RegistrationSettings, size=48, spacing=2.0)
    with pytest.raises(InputError) as caught:
        later(RegistrationSettings, tmp_path, word, value, own=["registration"])
    assert f"{word} {value} contradicts {word} {there}" in str(caught.value)
    assert str(tmp_path / "registration") in str(caught.value)
    assert "omit it, start over with --overwrite, or choose another --out" in str(caught.value)


def test_a_contradiction_of_what_was_not_given_is_plain(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings)
    with pytest.raises(InputError, match="--labelled-cases 2 contradicts no --labelled-cases of "):
        later(RegistrationSettings, tmp_path, "--labelled-cases", "2", own=["registration"])


def test_runs_that_contradict_each_other_are_named_unless_the_later_one_is_made_anew(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings, size=48)
    for folder in ("segmentation/original", "propagation"):
        stored_run(tmp_path, folder, SegmentationSettings, size=32, seed=1)
    words = {"own": ["segmentation/original"], "earlier": ["registration"]}
    with pytest.raises(InputError) as caught:
        later(SegmentationSettings, tmp_path, **words)
    one, other = tmp_path / "segmentation/original", tmp_path / "registration"
    assert str(caught.value).startswith(f"--size 32 of {one} contradicts --size 48 of {other};")
    assert later(SegmentationSettings, tmp_path, "--overwrite", **words).size == 48
    anew = later(PropagationSettings, tmp_path, own=["propagation"], earlier=["registration"])
    assert (anew.size, anew.seed) == (48, 0)
    stored_run(tmp_path, "segmentation/propagated", SegmentationSettings, size=48)
    with pytest.raises(InputError, match=r"contradicts .*redo one of them with --overwrite"):
        later(EvaluationSettings, tmp_path, earlier=["segmentation/original", "segmentation/propagated"])


def test_each_u_net_goes_on_with_its_own_words(tmp_path):
    folders = ["segmentation/original", "segmentation/propagated"]
    stored_run(tmp_path, folders[0], SegmentationSettings, lr=0.5, channels=8, seed=1)
    alone = later(SegmentationSettings, tmp_path, "--labels", "propagated", own=folders)
    assert (alone.lr, alone.channels) == (0.5, 8), "so that only the labels differ"
    words = ["--labels", "propagated", "--lr", "0.25"]
    assert later(SegmentationSettings, tmp_path, *words, own=folders).lr == 0.25, "unless it is given"
    with pytest.raises(InputError, match=r"--channels 4 contradicts --channels 8 of .*; omit it or"):
        later(SegmentationSettings, tmp_path, *words, "--channels", "4", "--overwrite", own=folders)
    stored_run(tmp_path, folders[1], SegmentationSettings, lr=0.25, channels=8)
    for name, lr in (("original", 0.5), ("propagated", 0.25)):
        assert later(SegmentationSettings, tmp_path, "--labels", name, own=folders).lr == lr
    with pytest.raises(InputError, match=r"--lr 0\.5 of .* contradicts --lr 0\.25 of"):
        later(SegmentationSettings, tmp_path, own=folders)
    assert later(EvaluationSettings, tmp_path, earlier=folders).seed == 1, "seeds may differ"


def test_both_u_nets_have_one_seed_whatever_the_registration_has(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings, seed=1)
    stored_run(tmp_path, "segmentation/original", SegmentationSettings, seed=2)
    words = {"own": ["segmentation/original", "segmentation/propagated"], "earlier": ["registration"]}
    assert later(SegmentationSettings, tmp_path, "--labels", "propagated", **words).seed == 2
    with pytest.raises(InputError, match="--seed 1 contradicts --seed 2 of .*original"):
        later(SegmentationSettings, tmp_path, "--labels", "propagated", "--seed", "1", **words)


@pytest.mark.parametrize(("old", "new"), [("paper", "strong"), ("strong", "paper")])
def test_labels_are_made_anew_by_the_recipe_of_a_registration_that_was(tmp_path, old, new):
    words = {"own": ["propagation"], "earlier": ["registration"]}
    stored_run(tmp_path, "registration", RegistrationSettings, recipe=old)
    first = later(PropagationSettings, tmp_path, "--frames", "all", **words)
    with run_folder(first, "propagation", []):
        pass
    stored_run(tmp_path, "registration", RegistrationSettings, recipe=new, overwrite=True)
    found = later(PropagationSettings, tmp_path, **words)
    fresh = PropagationSettings.STRONG if new == "strong" else vars(PropagationSettings())
    assert (found.recipe, found.trust, found.refine) == (new, fresh["trust"], fresh["refine"])
    assert found.frames == "all", "which no recipe changes"


def test_a_run_that_leaves_bad_cases_out_goes_on_so_whatever_the_one_before_did(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings)
    stored_run(tmp_path, "segmentation/original", SegmentationSettings, skip_bad=True)
    words = {"own": ["segmentation/original"], "earlier": ["registration"]}
    assert later(SegmentationSettings, tmp_path, "--labels", "original", **words).skip_bad


def test_a_setting_that_a_run_did_not_know_is_off_whatever_its_recipe(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings, recipe="strong", guided=True)
    config = tmp_path / "registration" / "config.json"
    content = json.loads(config.read_text())
    del content["settings"]["difference_weight"]
    config.write_text(json.dumps(content))
    found = later(RegistrationSettings, tmp_path, own=["registration"])
    assert (found.guided, found.difference_weight) == (True, 0.0)


def test_labels_are_made_anew_by_the_recipe_of_today_where_a_run_did_not_know_a_setting(tmp_path):
    settings = {"recipe": "strong", "trust": True, "frames": "all"}
    stored_run(tmp_path, "propagation", PropagationSettings, **settings)
    config = tmp_path / "propagation" / "config.json"
    content = json.loads(config.read_text())
    del content["settings"]["refine"]
    config.write_text(json.dumps(content))
    found = later(PropagationSettings, tmp_path, own=["propagation"])
    assert (found.trust, found.frames, found.refine) == (True, "all", PropagationSettings.STRONG["refine"])


def test_overwrite_forgets_the_run_but_not_the_scripts_before(tmp_path):
    stored_run(tmp_path, "registration", RegistrationSettings, size=64)
    stored_run(tmp_path, "segmentation/original", SegmentationSettings, size=64, lr=0.5)
    words = {"own": ["segmentation/original"], "earlier": ["registration"]}
    assert later(SegmentationSettings, tmp_path, **words).lr == 0.5
    anew = later(SegmentationSettings, tmp_path, "--overwrite", "--lr", "0.25", **words)
    assert (anew.lr, anew.size) == (0.25, 64)
    with pytest.raises(InputError, match="contradicts .*; omit it or use it with another --out"):
        later(SegmentationSettings, tmp_path, "--overwrite", "--size", "32", **words)


def test_device_workers_and_labels_belong_to_the_call_not_to_the_run(tmp_path):
    words = {"device": "cpu", "workers": 3, "labels": "original"}
    stored_run(tmp_path, "segmentation/original", SegmentationSettings, **words)
    found = later(SegmentationSettings, tmp_path, own=["segmentation/original"])
    assert (found.device, found.workers, found.labels) == ("auto", 0, "both")


def test_recipe_strong_changes_the_defaults_that_neither_run_nor_user_gave(tmp_path):
    @dataclasses.dataclass
    class Strong(RegistrationSettings):
        STRONG = types.MappingProxyType({"lr": 0.25, "patience": 3})

    strong = ["--recipe", "strong"]
    assert [later(Strong, tmp_path).lr, later(Strong, tmp_path, *strong).lr] == [1e-3, 0.25]
    assert later(Strong, tmp_path, *strong, "--lr", "0.5").lr == 0.5
    assert later(Strong, tmp_path, *strong).patience == 3
    stored_run(tmp_path, "registration", Strong, recipe="strong", lr=0.125)
    assert later(Strong, tmp_path, own=["registration"]).lr == 0.125


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}', "null"])
def test_a_damaged_config_is_one_clear_line(tmp_path, content):
    (tmp_path / "registration").mkdir()
    (tmp_path / "registration" / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: not .*--overwrite"):
        later(RegistrationSettings, tmp_path, own=["registration"])


# -------------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    "words",
    [
        "--size 100", "--size 0", "--size -16", "--spacing 0", "--spacing nan", "--spacing inf", "--lr -1",
        "--spacing 1e9", "--lr 1e39", f"--seed {10**30}",
        "--epochs 0", "--max-steps 0", "--batch-size 0", "--steps-per-epoch 0", "--seed -1", "--workers -1",
        "--patience -1", "--averaging 2", "--labelled-share -0.1", "--smoothness nan",
    ],
)
def test_a_value_that_cannot_work_is_refused_before_any_work(tmp_path, capsys, words):
    code = train_registration.main(["--data", "D", "--out", str(tmp_path / "run"), *words.split()])
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words.split()[0] in lines[0]
    assert not (tmp_path / "run").exists()


BAD_WORDS = [
    ["--size", "big"],
    ["--recipe", "weak"],
    ["--no-such-word"],
    ["--no\nsuch"],
    ["--out"],
    ["--seed", "1", "2"],
]


@pytest.mark.parametrize("module", [*SCRIPTS, demo, check, phantom], ids=lambda module: module.__name__)
@pytest.mark.parametrize("words", BAD_WORDS, ids=str)
def test_words_that_no_one_knows_are_one_line_and_exit_2(module, words, capsys):
    assert module.main(["--data", "D", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help" in line


def test_a_wrong_size_names_the_sizes_beside_it():
    with pytest.raises(InputError, match="96 or 112"):
        RegistrationSettings(size=100).check()


@pytest.mark.parametrize("module", [train_registration, propagate_labels, train_segmentation])
def test_data_is_required(module, capsys):
    assert module.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--data" in line


# ------------------------------------------------------------------------------- through the scripts


@pytest.mark.parametrize("module", [propagate_labels, train_segmentation, evaluate])
def test_a_contradiction_ends_a_later_script_with_both_values(module, trained_run, capsys):
    data, out = trained_run
    assert module.main(["--data", str(data), "--out", str(out), "--size", "48"]) == 2
    assert "--size 48 contradicts --size 32" in capsys.readouterr().err


def test_every_run_says_what_it_used(trained_run):
    _, out = trained_run
    kinds = {
        "registration": RegistrationSettings,
        "propagation": PropagationSettings,
        "segmentation/original": SegmentationSettings,
        "segmentation/propagated": SegmentationSettings,
    }
    for folder, kind in kinds.items():
        used = json.loads((out / folder / "config.json").read_text())["settings"]
        assert set(used) == {item.name for item in dataclasses.fields(kind)}
        assert (used["size"], used["spacing"], used["seed"], used["recipe"]) == (32, 2.0, 0, "paper")
        assert set(used) & set(settings_module.MAY_CHANGE) == {"nifti", "skip_bad"} or used["max_steps"] == 4


@pytest.mark.parametrize(
    ("module", "missing"),
    [(propagate_labels, "registration"), (train_segmentation, "propagation"), (evaluate, "segmentation")],
)
def test_a_script_run_too_early_names_what_is_missing(module, missing, tiny_data, tmp_path, capsys):
    words = ["--data", str(tiny_data), "--out", str(tmp_path / "run"), "--size", "32", "--spacing", "2"]
    assert module.main(words) == 2
    line = capsys.readouterr().err
    assert missing in line
    assert "first" in line
    assert "Traceback" not in line


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_data_that_is_not_there_is_one_line(module, trained_run, tmp_path, capsys):
    _, out = trained_run
    assert module.main(["--data", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert "nowhere" in lines[0]

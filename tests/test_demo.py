"""The demo: the four scripts on a phantom, scored against its truth."""

import numpy as np
import pytest

from cardiac import demo
from cardiac.phantom import write_phantom
from cardiac.settings import PropagationSettings, parse

TINY = (
    "--size 48 --spacing 4 --max-steps 2 --steps-per-epoch 2 --lr 1e-4",
    "",
    "--channels 2 --max-steps 2",
    "",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a demo with tiny settings."""
    out = tmp_path_factory.mktemp("demo")
    write_phantom(
        out / "phantom", training=2, validation=1, testing=4, unlabelled=1, frames=6, slices=2, size=48
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", tuple((step[0], words) for step, words in zip(demo.STEPS, TINY)))
        assert demo.main(["--out", str(out), "--device", "cpu"]) == 0
    return out


def test_demo_leaves_what_it_names(ran):
    for name in (
        "registration/example.png",
        "propagation/cine.gif",
        "evaluation/report.html",
        "evaluation/table.md",
    ):
        assert (ran / "runs" / name).stat().st_size > 0


def test_truth_is_scored_at_every_frame_between(ran):
    words = ["--data", str(ran / "phantom"), "--out", str(ran / "runs")]
    settings = parse(PropagationSettings, words, None, earlier=("registration",))
    rows = demo.score_against_truth(settings)
    assert len({row["case"] for row in rows}) == 2
    # after two small training steps, almost the identity: both errors agree, and the labels overlap in part
    assert all(abs(row["error_mm"] - row["identity_mm"]) < 0.5 for row in rows)
    assert 0.3 < np.mean([row["LV"] for row in rows]) < 1
    assert max(row["identity_mm"] for row in rows) > 1

"""The verdict on a control-gap curve."""

import json

import numpy as np
import pytest
from controlnet.cli.main import main
from controlnet.model.training.report import describe, draw_curve, duration, read_run
from controlnet.model.training.verdict import EXPECTED_STEPS, verdict
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.lock import locked
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = {"max_steps": 1000, "learning_rate": 1e-5, "accumulation": 1, "kind": "canny", "base": "tiny"}


def rows(gaps, every=50, band=0.001):
    return [{"step": i * every, "control_gap": gap, "band": band, "validation_loss": 0.4} for i, gap in enumerate(gaps)]


def test_before_anything():
    assert verdict([], SETTINGS, {}).word == "waiting"
    assert verdict(rows([0.0]), SETTINGS, {}).word == "waiting"


def test_a_jump_converges_where_it_began():
    found = verdict(rows([0, 0, 0.0005, 0, 0.004, 0.009, 0.02, 0.03]), SETTINGS, {})
    assert (found.word, found.step) == ("converged", 200)


def test_control_that_is_lost_again_is_told():
    gaps = [0, 0.01, 0.01, 0.01, 0.01, 0, 0, 0]
    assert verdict(rows(gaps[:-1]), SETTINGS, {}).word == "converged"
    found = verdict(rows(gaps), SETTINGS, {})
    assert (found.word, found.step, found.lost) == ("waiting", None, 250) and "lost at step 250" in found.text
    assert "too high" in verdict(rows(gaps), SETTINGS, {}, finished=True).causes[0]
    found = verdict(rows([*gaps, 0.01, 0.02, 0.02]), SETTINGS, {})
    assert (found.word, found.step, found.lost) == ("converged", 400, None)


def test_a_run_that_has_finished_early_does_not_wait():
    assert verdict(rows([0.0] * 5), SETTINGS, {}, finished=True).word == "overdue"


def test_one_lucky_look_is_no_convergence():
    assert verdict(rows([0, 0.004, 0, 0.004, 0.004, 0]), SETTINGS, {}).word == "waiting"


@given(st.lists(st.floats(-0.00099, 0.00099), max_size=19))
def test_noise_never_converges(gaps):
    assert verdict(rows(gaps), SETTINGS, {}).word == "waiting"


@given(st.integers(0, 10), st.integers(3, 9))
def test_a_lasting_gap_always_does(before, after):
    found = verdict(rows([0.0] * before + [0.01] * after), SETTINGS, {})
    assert (found.word, found.step) == ("converged", 50 * before)


def test_an_ended_or_very_long_run_is_overdue():
    assert verdict(rows([0.0] * 21), SETTINGS, {}).word == "overdue"
    long = SETTINGS | {"max_steps": 10**6}
    assert verdict(rows([0.0] * 5, every=EXPECTED_STEPS // 4), long, {}).word == "overdue"
    assert verdict(rows([0.0] * 5, every=EXPECTED_STEPS // 5), long, {}).word == "waiting"


@pytest.mark.parametrize(
    "settings, facts, told",
    [
        ({}, {"line_map_brightness": 0.9}, "polarity"), ({"learning_rate": 1e-8}, {}, "learning_rate 1e-08 is low"),
        ({"learning_rate": 0.1}, {}, "is high"), ({}, {}, "too few optimiser steps: 1,000"),
        ({"accumulation": 8}, {}, "accumulation=8"), ({}, {"condition_spread": 0.001}, "hardly differ"),
        ({}, {}, "wrong kind"),
    ],
)  # fmt: skip
def test_causes_are_named(settings, facts, told):
    assert any(told in cause for cause in verdict(rows([0.0] * 21), SETTINGS | settings, facts).causes)


def test_accumulated_batches_are_not_steps():
    """1,000 steps of 8 batches are 1,000 steps."""
    causes = verdict(rows([0.0] * 21), SETTINGS | {"accumulation": 8}, {}).causes
    assert any("1,000," in cause for cause in causes) and not any("8000" in cause for cause in causes)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "photos-1"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"settings": SETTINGS, "facts": {}, "data": {"pairs": 9}}))
    log = rows([0.0, 0.0, 0.004, 0.01, 0.02])
    log += [{"step": s, "seconds": 2.0 * s, "loss": 0.4, "lr": 1e-5} for s in range(10, 201, 10)]
    text = "".join(json.dumps(row) + "\n" for row in sorted(log, key=lambda r: r["step"]))
    (folder / "log.jsonl").write_text(text + '{"step": 21')  # killed while it wrote
    return folder


def test_status_of_a_running_run(run, capsys):
    state = read_run(run)
    assert state.step == 200 and state.seconds_left == pytest.approx(1600)
    assert describe(state)[:2] == ["converged at step 100: the condition matters", "step 200 of 1,000, stopped"]
    with locked(run):
        assert describe(read_run(run))[1] == "step 200 of 1,000, 27 min left"
    with open(run / "log.jsonl", "a") as file:
        file.write('0}\n{"step": 210, "ended": "exploded"}\n')
    assert describe(read_run(run))[1] == "step 210 of 1,000, exploded"
    with pytest.raises(SystemExit) as stopped:
        main(["status", str(run)])
    assert stopped.value.code == 0
    assert "control gap 0.0200 (noise 0.0010)" in capsys.readouterr().out


def test_the_curve_shows_the_gap(run):
    draw_curve(read_run(run), run / "curve.png")
    image, _ = read_image((run / "curve.png").read_bytes(), "")
    assert image.shape == (600, 800, 3)
    blue = np.abs(image.astype(int) - (31, 119, 180)).max(-1) < 30
    assert blue[:360].sum() > 100 and blue[400:].sum() == 0


def test_status_of_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["status", str(tmp_path)])
    assert stopped.value.code == Exit.INPUT
    assert "is not a training run" in capsys.readouterr().err


def test_a_run_that_exploded_says_so_first(run):
    with open(run / "log.jsonl", "a") as file:
        file.write('\n{"step": 400, "ended": "exploded"}\n')
    assert describe(read_run(run, at_work=False))[0].startswith("exploded at step 400; before that: ")


def test_a_record_that_is_broken(run, capsys):
    (run / "run.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        main(["status", str(run)])
    assert stopped.value.code == Exit.INPUT and "not valid JSON" in capsys.readouterr().err


def test_durations():
    assert [duration(s) for s in (40, 720, 7500)] == ["40 s", "12 min", "2 h 05 min"]


def test_control_that_has_just_begun():
    """Neither waiting nor overdue: since when, and how many looks confirm it."""
    for finished in (False, True):
        one = verdict(rows([0, 0, 0.0071], band=0.0025), SETTINGS, {}, finished)
        assert (one.word, one.step) == ("begun", 100) and "step 100: one look of 3 so far" in one.text
        two = verdict(rows([0, 0.005, 0.0071], band=0.0025), SETTINGS, {}, finished)
        assert (two.word, two.step) == ("begun", 50) and "2 of 3 looks confirm it" in two.text
        assert ("--resume" in two.text) == finished and not two.causes
    assert verdict(rows([0, 0.0071, 0], band=0.0025), SETTINGS, {}).word == "waiting"

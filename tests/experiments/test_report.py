import dataclasses
import math
import statistics

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from experiments import report
from experiments.estimates import Estimate, estimate, paired_difference
from experiments.mask import evaluations_of
from experiments.report import PAGE, Findings, fill, overview
from experiments.study import Arm, Study
from tests.experiments.tiny import STUDY
from tests.pictures import check_legible

ARMS = (Arm("castling", {}, (0, 1, 2), (0.1, 0.2)), Arm("softmax", {}, (0, 1, 2), (0.1,)), Arm("new", {}, (0,), (0.1,)))
THREE_ARMS = Study(STUDY.config, ARMS, "softmax", "test", "Digits.")


def result(arm, rate, seed, accuracy, validation=0.5):
    return {
        **{"variant": arm, "learning_rate": rate, "seed": seed, "accuracy_inference_form": accuracy},
        **{"accuracy_validation": validation, "images": 10_000, "data": {"test_split": "test"}, "commit": 40 * "a"},
        **{"machine": "a GPU", "versions": {"jax": "0.10.2"}},
        **{"parameters": 1234, "macs": 5_600_000, "steps": 70, "seconds": 100.0 + seed},
    }


RESULTS = [
    *(result("softmax", 0.1, seed, accuracy) for seed, accuracy in enumerate((0.70, 0.72, 0.71))),
    *(result("castling", 0.1, seed, accuracy) for seed, accuracy in enumerate((0.71, 0.74, 0.70))),
    # Better on the test split, but not on validation images.
    *(result("castling", 0.2, seed, 0.9, validation=0.4) for seed in range(3)),
    result("new", 0.1, 0, 0.65),
]


def test_the_interval_is_students_of_paired_differences():
    arm, control = np.random.default_rng(0).normal(size=(2, 6))
    found = paired_difference(dict(enumerate(arm)), dict(enumerate(control)))
    assert found.n == 6
    # A second way to the same formula in float64: a few roundings.
    assert found.mean == pytest.approx(statistics.fmean(arm - control), rel=1e-12)
    assert found.sd == pytest.approx(statistics.stdev(arm - control), rel=1e-12)
    expected = stats.ttest_rel(arm, control).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_only_seeds_of_both_arms_are_paired():
    found = paired_difference({0: 5.0, 1: 7.0, 2: 9.0, 4: 100.0}, {2: 5.0, 1: 6.0, 0: 5.0, 3: -100.0})
    # Differences 0, 1, 4: their mean is 5 / 3, their variance 13 / 3, and tables give 4.303 for two degrees of freedom.
    assert (found.mean, found.n) == (pytest.approx(5 / 3), 3)
    assert found.interval[1] - found.mean == pytest.approx(4.303 * math.sqrt(13 / 3) / math.sqrt(3), rel=1e-4)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_a_mean_and_no_more():
    found = estimate([3.0])
    assert (found.mean, found.n) == (3, 1)
    assert np.isnan([found.sd, *found.interval]).all()


def test_a_study_in_texts():
    texts = Findings("tiny", THREE_ARMS, RESULTS).texts()
    lines = texts["tiny"].splitlines()
    assert lines[0] == (
        "`python -m experiments.run tiny` makes these results, as `experiments/studies/tiny.py` says: "
        "10 of 10 runs are finished. Digits."
    )
    assert "on a GPU (JAX 0.10.2). Accuracies" in lines[1]
    assert "| castling | 0.1 (chosen on validation) | 71.67 ± 2.08 | 3 | 1,234 | 5.60 M | 70 |" in lines
    assert "| castling | 0.2 | 90.00 ± 0.00 | 3 | 1,234 | 5.60 M | 70 |" in lines
    assert "| softmax | 0.1 | 71.00 ± 1.00 | 3 | 1,234 | 5.60 M | 70 |" in lines
    assert "| new | 0.1 | 65.00 (screening: one seed) | 1 | 1,234 | 5.60 M | 70 |" in lines
    # Differences of 1, 2 and -1 points, of deviation 1.5275: 4.3027 * 1.5275 / sqrt(3) = 3.7946.
    assert "| castling | +0.67 [-3.13, +4.46] | 3 |" in lines
    assert "| new | -5.00 (screening: one seed) | 1 |" in lines
    assert not any(line.startswith("| softmax | +") for line in lines)
    assert texts["tiny/castling/accuracy"] == "71.67 ± 2.08"
    assert texts["tiny/castling/difference"] == "+0.67 [-3.13, +4.46]"


def test_the_contrasts_that_a_study_was_made_for_come_first():
    study = dataclasses.replace(THREE_ARMS, contrasts=(("castling", "new"), ("castling", "softmax")))
    texts = Findings("tiny", study, RESULTS).texts()
    lines = texts["tiny"].splitlines()
    assert "| castling - new | +6.00 (screening: one seed) | 1 |" in lines
    assert lines.index("| castling - softmax | +0.67 [-3.13, +4.46] | 3 |") < lines.index(
        "| castling | +0.67 [-3.13, +4.46] | 3 |"
    )
    assert texts["tiny/castling-softmax/difference"] == "+0.67 [-3.13, +4.46]"
    without = Findings("tiny", study, [one for one in RESULTS if one["variant"] != "softmax"]).texts()
    assert "difference from softmax" in texts["tiny"]
    assert "difference from softmax" not in without["tiny"]
    without = Findings("tiny", study, [one for one in RESULTS if one["variant"] != "new"]).texts()
    assert "| castling - new | (no result yet) | 0 |" in without["tiny"].splitlines()


def test_arms_of_two_studies_are_compared_on_the_same_images():
    better = [one | {"accuracy_inference_form": one["accuracy_inference_form"] + 0.01} for one in RESULTS[:2]]
    tiny, again = Findings("tiny", THREE_ARMS, RESULTS), Findings("again", THREE_ARMS, better)
    elsewhere = Findings("elsewhere", THREE_ARMS, [one | {"data": {"test_split": "val"}} for one in RESULTS])
    texts = report.across([tiny, again, elsewhere, Findings("unfinished", THREE_ARMS, [])])
    # Two seeds in common. Castling's differences are 0 and 1 points: 12.706 * 0.7071 / sqrt(2) = 6.35.
    assert texts["tiny/castling-again/softmax/difference"] == "+0.50 [-5.85, +6.85]"
    assert texts["again/softmax-tiny/castling/difference"] == "-0.50 [-6.85, +5.85]"
    assert texts["tiny/softmax-again/softmax/difference"] == "-1.00 [-1.00, -1.00]"
    assert texts["tiny/new-again/softmax/difference"] == "-6.00 (screening: one seed)"
    # The page may name what has not run yet, and no images of another split.
    assert texts["unfinished/castling-tiny/softmax/difference"] == "(no result yet)"
    assert not any("tiny" in key and "elsewhere" in key for key in texts)


def test_a_study_without_results_says_so():
    texts = Findings("tiny", THREE_ARMS, []).texts()
    assert "0 of 10 runs" in texts["tiny"]
    assert texts["tiny"].endswith("No results yet.")
    assert texts["tiny/new/accuracy"] == texts["tiny/new/difference"] == "(no result yet)"
    assert all(picture.digest() is None for picture in Findings("tiny", THREE_ARMS, []).pictures())


def test_a_picture_tells_its_results(tmp_path):
    (picture, *_), (other, *_) = (Findings("tiny", THREE_ARMS, some).pictures() for some in (RESULTS, RESULTS[1:]))
    (tmp_path / "a.png").write_bytes(picture.draw())
    assert report._digest_of(tmp_path / "a.png") == picture.digest() != other.digest()
    with Image.open(tmp_path / "a.png") as image:
        assert len(np.unique(np.asarray(image))) > 10  # there is something in it
    assert report._digest_of(tmp_path / "none.png") is None
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    assert report._digest_of(tmp_path / "damaged.png") == ""
    axes = picture.figure().axes[0]
    # A dot for each seed, and a bar for the mean of several, in a row for each arm and rate.
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["castling, 0.1", "castling, 0.2", "softmax, 0.1", "new, 0.1"]
    assert [line.get_xdata().item() for line in axes.lines if line.get_marker() == "|"] == pytest.approx(
        [71.67, 90, 71], abs=0.01
    )
    check_legible(picture.figure())


def evaluation(epoch, threshold, density, accuracies):
    names = ("epoch", "mask_threshold", "mask_density", "accuracy_train_form", "accuracy_inference_form")
    return dict(zip(names, (epoch, threshold, density, *accuracies), strict=True))


def test_how_a_mask_empties():
    masks = [
        [evaluation(1.0, 0.1, [0.5, 0.25], (0.6, 0.4)), evaluation(2.0, 1.0, [0.0, 0.0], (0.7, 0.7))],
        [evaluation(1.0, 0.1, [0.3, 0.15], (0.6, 0.5)), evaluation(2.0, 1.0, [0.0, 0.0], (0.7, 0.7))],
    ]
    results = [result("castling", 0.1, seed, 0.7) | {"mask": one} for seed, one in enumerate(masks)]
    results.append(result("softmax", 0.1, 0, 0.7) | {"mask": []})
    findings = Findings("tiny", THREE_ARMS, results)
    texts = findings.texts()
    lines = texts["tiny/castling/mask"].splitlines()
    # Drops of 20 and 10 points: a mean of 15 and a deviation of 10 / sqrt(2).
    assert lines[2:4] == ["| 1 | 0.100 | 40.0, 20.0 | 15.00 ± 7.07 |", "| 2 | 1.000 | 0.0, 0.0 | 0.00 ± 0.00 |"]
    assert lines[-1] == "![How the mask empties](evidence_tiny_castling_mask.png)"
    assert texts["tiny/softmax/mask"] == "(no result yet)"
    shown = {picture.path.name: picture for picture in findings.pictures() if picture.shown}
    assert shown.keys() == {"evidence_tiny.png", "evidence_tiny_castling_mask.png"}
    figure = shown["evidence_tiny_castling_mask.png"].figure()
    left, right, *_ = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [pytest.approx([40, 0]), pytest.approx([20, 0])]
    assert [list(line.get_ydata()) for line in right.lines[:2]] == [pytest.approx([20, 0]), pytest.approx([10, 0])]
    check_legible(figure)


def test_evaluations_are_found_in_the_log_with_the_latest_density():
    forms = {"accuracy_train_form": 0.5, "accuracy_inference_form": 0.4}
    metrics = [
        {"step": 1, "epoch": 0.5, "mask_density": [0.5], "mask_threshold": 0.02},
        {"step": 2, "epoch": 1.0, "accuracy": 0.5, "mask_threshold": 0.1, **forms},
        {"step": 4, "epoch": 2.0, "mask_density": [0.0], "mask_threshold": 1.0, **forms},
    ]
    found = evaluations_of(metrics)
    assert found == [evaluation(1.0, 0.1, [0.5], (0.5, 0.4)), evaluation(2.0, 1.0, [0.0], (0.5, 0.4))]
    assert evaluations_of([line | {"mask_density": [0.0]} for line in metrics]) == []


def test_a_page_is_filled_between_its_marks_alone(refuses):
    page = "A <!-- report: s -->old<!-- end --> B <!-- report: s/a/accuracy --><!-- end --> % C"
    texts = {"s": "table", "s/a/accuracy": "7", "t": "table", "s/a/mask": "| a |\n| b |"}
    filled = fill(page, texts, "a.md")
    assert filled == "A <!-- report: s -->\n\ntable\n\n<!-- end --> B <!-- report: s/a/accuracy -->7<!-- end --> % C"
    assert fill(filled, texts, "a.md") == filled
    lines = fill("<!-- report: s/a/mask --><!-- end -->", texts, "a.md")
    assert lines == "<!-- report: s/a/mask -->\n\n| a |\n| b |\n\n<!-- end -->"
    with refuses("unknown key 's/a/accuracy'"):
        fill(page, {"s": "table"}, "a.md")
    for old, new in (
        ("<!-- end -->", "<!--\nend -->"),
        ("report: s ", "report:\ns "),
        ("<!-- report: s ", "<!--report: s "),
        ("<!-- report: s ", "<!-- Report: s "),
        ("<!-- end -->", "<!-- end-->"),
    ):
        with refuses("'a.md' has a mark that is no"):
            fill(page.replace(old, new, 1), texts, "a.md")


@pytest.mark.parametrize("typed", ["71.67 ± 2.08", "+0.67 [-3.13, +4.46]", "-0.67 [-3.13, +4.46]"])
def test_a_figure_outside_of_marks_is_refused(refuses, typed):
    with refuses("README.md", f"the figure '{typed}' outside of marks"):
        fill(f"Castling had {typed} points.", {}, "README.md")
    page = f"Castling had <!-- report: s/a/accuracy -->{typed}<!-- end -->, from [1, 2] to -3 and ±2."
    assert fill(page, {"s/a/accuracy": typed}, "README.md") == page


def test_a_study_without_a_place_and_a_folder_without_a_study_are_named(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(report, "PAGE", tmp_path / "evidence.md")
    (tmp_path / "evidence.md").write_text(PAGE.read_text().replace("<!-- report: cifar10_pilot -->", "<!-- end -->"))
    with refuses("no place for cifar10_pilot", "<!-- report: cifar10_pilot -->"):
        report.report(check=True)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "old_study").mkdir()
    with refuses("unknown folder of results 'old_study'"):
        report.report(check=True)


def test_the_overview_shows_three_lines_and_the_controls_with_seeds():
    counts = ("softmax-64", "softmax-256", "linear_angular-64", "linear_angular-256", "castling-64", "castling-256")
    study = Study(
        STUDY.config, tuple(Arm(name, {}, (0, 1, 2), (0.1,)) for name in counts), "softmax-64", "test", "Digits."
    )
    results = [result(name, 0.1, seed, 0.5 + 0.1 * seed) for name in counts for seed in (0, 1, 2)]
    main, tokens = Findings("main", THREE_ARMS, RESULTS), Findings("tokens", study, results)
    better = [one | {"accuracy_inference_form": one["accuracy_inference_form"] + 0.01} for one in RESULTS[3:]]
    equal = Findings("equal", THREE_ARMS, [*RESULTS[:3], *better])
    alone = dataclasses.replace(THREE_ARMS, arms=ARMS[1:2])
    rates = Findings("rates", alone, RESULTS[:3])
    kinds = ("softmax", "linear_angular")
    speed = [
        {"attention": kind, "tokens": count, "milliseconds": {"median": count / 100}}
        for kind in kinds
        for count in (64, 256)
    ]
    picture = overview(main, equal, rates, tokens, speed)
    left, right = picture.figure().axes
    assert [line.get_label() for line in left.lines] == ["softmax", "linear_angular", "castling"]
    assert all(list(line.get_xdata()) == [0.64, 2.56] for line in left.lines)
    # Means of 50, 60 and 70 % with Student's interval of three: 4.303 * 10 / sqrt(3) = 24.84.
    assert [bars.get_segments()[0][:, 1].tolist() for bars in left.collections] == 6 * [
        pytest.approx([35.16, 84.84], abs=0.01)
    ]
    assert len(right.patches) == 3  # the margin of softmax's row in each study
    margin, bars = right.patches[0].get_extents().transformed(right.transData.inverted()), right.collections
    assert (margin.x0, margin.x1) == pytest.approx((-0.5, 0.5))
    assert bars[0].get_segments()[0][:, 0] == pytest.approx([-3.13, 4.46], abs=0.01)
    for row in (1, 2):  # castling of the second study, against both studies' softmax
        assert bars[row].get_segments()[0][:, 0] == pytest.approx([-2.13, 5.46], abs=0.01)
    # "new" has one seed: a screening.
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "softmax (0.1, 0.1), n = 3",
        "softmax (0.1, 0.1), n = 3",
        "softmax (0.1, 0.1), n = 3",
    ]
    assert [one.get_text() for one in picture.figure().legends[0].get_texts()].count("margin") == 1
    check_legible(picture.figure())
    assert picture.digest()
    empty, no_tokens = Findings("main", THREE_ARMS, []), Findings("tokens", study, results[6:])
    whole = (main, equal, rates, tokens, speed)
    for place, missing in enumerate((empty, empty, Findings("rates", alone, []), no_tokens, [])):
        assert overview(*whole[:place], missing, *whole[place + 1 :]).digest() is None
    # The interval of two seeds is not drawn.
    two = Findings("tokens", study, [one for one in results if one["seed"] < 2])
    assert not overview(main, equal, rates, two, speed).figure().axes[0].collections


def test_measured_times_are_a_table():
    rows = [
        {"attention": name, "tokens": count, "milliseconds": {"min": 0.1, "median": time, "max": 9.0}}
        for count, times in ((64, (0.5, 0.25)), (1024, (100, 12.345)))
        for name, time in zip(("softmax", "linear_angular"), times, strict=True)
    ]
    speed = {"machine": {"processor": "a processor"}, "versions": {"jax": "1.2"}, "repeats": 7, "rows": rows}
    lines = report.speed_table(speed).splitlines()
    assert lines[0].startswith("Milliseconds an image on one core (a processor, JAX 1.2), the median of 7 calls.")
    assert lines[2:] == [
        "| attention | 64 tokens | 1,024 tokens |",
        "|---|---|---|",
        "| softmax | 0.50 | 100.00 |",
        "| linear_angular | 0.25 | 12.35 |",
    ]
    assert report.speed_table({"rows": []}) == "(no result yet)"


def test_estimates_are_values():
    assert estimate([1.0, 3.0]) == Estimate(2.0, math.sqrt(2), 2)


def test_the_committed_page_is_what_the_committed_results_give():
    assert report.report(check=True) == []

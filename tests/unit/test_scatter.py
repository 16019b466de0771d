"""The plot of a comparison: round numbers on its axes and labels that can be read."""

import numpy as np
import pytest
from matplotlib.text import Text

from lab.report import plots


def row(accuracy=0.9, seconds=10.0, model="lenet5", run="runs/a", dataset="digits"):
    """Return the columns of a run that the plot shows."""
    return {
        "run": run,
        "model": model,
        "dataset": dataset,
        "accuracy": accuracy,
        "MACs": 416_520,
        "seconds": seconds,
    }


def test_an_axis_has_two_to_eight_ticks_for_any_limits():
    for low in np.geomspace(1e-2, 1e12, 97):
        for decades in np.arange(0.05, 9, 0.05):
            ticks = plots.ticks(low, low * 10**decades)
            assert 2 <= len(ticks) <= plots.MAX_TICKS, (low, decades, ticks)
            assert low <= min(ticks) < max(ticks) <= low * 10**decades
            assert len({plots.format_number(value) for value in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1.2, 89), "2 5 10 20 50"),
        ((2.1, 9.4), "4 6 8"),
        ((2e4, 3e9), "100,000 1 M 10 M 100 M 1 G"),
    ],
)
def test_ticks_are_formatted_with_separators_and_units(limits, expected):
    assert " ".join(map(plots.format_number, plots.ticks(*limits))) == expected


def test_a_point_is_labeled_with_the_model_or_the_run_if_the_model_is_not_unique():
    rows = [row(run="runs/a"), row(run="runs/b"), row(run="other/b"), row(model="alexnet")]
    rows += [row(dataset="mnist")]
    assert plots.point_labels(rows) == ["runs/a", "runs/b", "other/b", "alexnet", "lenet5"]
    assert plots.point_labels(rows[:2]) == ["a", "b"]


def test_labels_overlap_neither_points_nor_each_other():
    rows = [row(0.9 + k / 1000, 10 + k / 5, run=f"runs/lenet5-digits-{k}") for k in range(5)]
    rows.append(row(0.5, 99, "alexnet"))  # far from the others, which are crowded
    figure = plots.accuracy_over_cost(rows)
    for axes in figure.axes:
        assert len(axes.texts) == len(rows)
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        points = axes.transData.transform(axes.collections[0].get_offsets())
        for k, box in enumerate(boxes):
            assert not box.count_overlaps(boxes[:k])
            assert not any(box.contains(x, y) for x, y in points)

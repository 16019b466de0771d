"""The picture of a comparison: round numbers on its axes, and names that can be read."""

import numpy as np
import pytest
from matplotlib.text import Text

from lab.report import plots


def row(accuracy=0.9, seconds=10.0, model="lenet5", run="runs/a", dataset="digits"):
    """What is drawn of a run."""
    return {
        "run": run,
        "model": model,
        "data set": dataset,
        "accuracy": accuracy,
        "multiply-adds": 416_520,
        "seconds": seconds,
    }


def test_an_axis_has_two_to_eight_labels_whatever_its_limits():
    for low in np.geomspace(1e-2, 1e12, 97):
        for decades in np.arange(0.05, 9, 0.05):
            at = plots.ticks(low, low * 10**decades)
            assert 2 <= len(at) <= plots.TICKS, (low, decades, at)
            assert low <= min(at) < max(at) <= low * 10**decades
            assert len({plots.plain(value) for value in at}) == len(at)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1.2, 89), "2 5 10 20 50"),
        ((2.1, 9.4), "4 6 8"),
        ((2e4, 3e9), "100,000 1 M 10 M 100 M 1 G"),
    ],
)
def test_labels_are_numbers_as_people_write_them(limits, expected):
    assert " ".join(map(plots.plain, plots.ticks(*limits))) == expected


def test_a_point_is_named_by_what_tells_it_apart():
    rows = [row(run="runs/a"), row(run="runs/b"), row(run="other/b"), row(model="alexnet")]
    rows += [row(dataset="mnist")]
    assert plots.label_offsets(rows) == ["runs/a", "runs/b", "other/b", "alexnet", "lenet5"]
    assert plots.label_offsets(rows[:2]) == ["a", "b"]


def test_names_cover_neither_points_nor_one_another():
    rows = [row(0.9 + k / 1000, 10 + k / 5, run=f"runs/lenet5-digits-{k}") for k in range(5)]
    rows.append(row(0.5, 99, "alexnet"))  # far off, so that the others are crowded
    figure = plots._draw_scatter(rows)
    for axes in figure.axes:
        assert len(axes.texts) == len(rows)
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        points = axes.transData.transform(axes.collections[0].get_offsets())
        for number, box in enumerate(boxes):
            assert not box.count_overlaps(boxes[:number])
            assert not any(box.contains(x, y) for x, y in points)

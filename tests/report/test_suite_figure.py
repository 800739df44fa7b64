"""A suite's picture in a report: lines with their intervals, whatever is missing."""

from specdec.report.figures.speed import speed_by_group

NAMES = ["short", "long"]


def test_intervals_are_drawn():
    without = speed_by_group(NAMES, {"a": [1.5, 1.2]}, {"a": [None, None]})
    drawn = speed_by_group(NAMES, {"a": [1.5, 1.2]}, {"a": [(1.1, 1.9), None]})
    wider = speed_by_group(NAMES, {"a": [1.5, 1.2]}, {"a": [(0.9, 1.9), None]})
    assert len({without, drawn, wider}) == 3


def test_a_group_without_a_speed_leaves_a_gap():
    gap = speed_by_group(NAMES, {"a": [None, 1.2]}, {"a": [None, (1.0, 1.4)]})
    assert gap != speed_by_group(NAMES, {"a": [1.0, 1.2]}, {"a": [None, (1.0, 1.4)]})

"""Runs as dots on a common scale."""

from benchmarks.dots import Row, dot_chart


def test_a_row_of_dots_has_its_mean_and_a_dot_for_each_run():
    chart = dot_chart("nats", [("lost", [Row("a & b", [0.01, 0.03]), Row("c", [-0.02])])])
    assert chart.count("<circle") == 3
    assert "+0.020" in chart
    assert "-0.020" in chart
    assert "a &amp; b" in chart

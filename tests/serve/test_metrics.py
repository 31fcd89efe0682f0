"""Prometheus' text form."""

import re

from lepton.serve.metrics import SECONDS, Histogram, Metrics

LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+')


def test_a_histogram_counts_by_upper_end():
    histogram = Histogram("x_seconds", "Help.")
    for seconds in (0.005, SECONDS[0], 0.2, 1000):
        histogram.add(seconds)
    lines = list(histogram.lines())
    assert lines[:3] == ["# HELP x_seconds Help.", "# TYPE x_seconds histogram", 'x_seconds_bucket{le="0.01"} 2']
    assert 'x_seconds_bucket{le="0.25"} 3' in lines
    assert lines[-3:] == ['x_seconds_bucket{le="+Inf"} 4', "x_seconds_sum 1000.215", "x_seconds_count 4"]


def test_everything_is_in_the_form_that_prometheus_reads():
    metrics = Metrics()
    metrics.count("/v1/models", 200)
    metrics.count("/v1/models", 200)
    metrics.count("other", 404)
    metrics.first_token.add(0.1)
    text = metrics.text([("lepton_tokens_total", "counter", "New tokens.", 12_345_678)])
    assert text.endswith("\n")
    lines = text.splitlines()
    assert 'lepton_requests_total{path="/v1/models",code="200"} 2' in lines
    assert "lepton_tokens_total 12345678" in lines
    assert all(line.startswith("# ") or LINE.fullmatch(line) for line in lines)
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))

"""Runs killed or stopped at random moments end as an uninterrupted one, bit for bit."""

import pytest

from experiments.benchmarks.preemption import measure


@pytest.mark.slow
def test_interruptions_leave_no_trace(tmp_path):
    """One of each signal in each stage; docs/training.md has the record of twenty."""
    for outcome in measure(tmp_path, count=1, per_run=1):
        assert outcome.interruptions == 1
        assert outcome.equal == outcome.runs, outcome

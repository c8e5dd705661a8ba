"""A run that is killed and stopped at random moments ends as an uninterrupted one, bit for bit."""

import random

import pytest

from experiments.benchmarks.preemption import SIGNALS, STAGES, fingerprint, finish, interrupt_once, start


@pytest.mark.slow
def test_interruptions_leave_no_trace(tmp_path):
    """One of each signal, in a stage each, all of one run; docs/training.md has the record of twenty in each stage."""
    rng = random.Random(0)
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    finish(start(reference))
    for stage, number in zip(STAGES, SIGNALS.values(), strict=True):
        # of a stage of at least three seconds
        assert interrupt_once(interrupted, stage, number, rng.uniform(0, 1))
    finish(start(interrupted))
    assert fingerprint(interrupted) == fingerprint(reference)

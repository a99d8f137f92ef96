"""Exclusive time by phase, and functions as they were afterwards."""

import pytest

from pertoken.machine.stopwatch import Stopwatch


def ticking(*times):
    return Stopwatch(clock=iter(map(float, times)).__next__)


def test_an_inner_phase_stops_the_outer_one():
    watch = ticking(0, 1, 4, 6)
    with watch.phase("outer"), watch.phase("inner"):
        pass
    assert watch.take() == {"outer": 1 + 2, "inner": 3}
    assert watch.take() == {}


def test_time_counts_when_the_phase_raises():
    watch = ticking(0, 5, 7, 8)
    with pytest.raises(KeyError), watch.phase("a"):
        raise KeyError
    with watch.phase("a"):
        pass
    assert watch.take() == {"a": 6}


class Worker:
    def work(self, factor, *, loud=False):
        return 2 * factor


def test_methods_are_timed_by_their_arguments_and_put_back():
    worker, watch = Worker(), ticking(0, 1, 1, 4)
    with watch.around(worker, "work", lambda factor, *, loud=False: "loud" if loud else "quiet"):
        assert worker.work(3) == 6
        assert worker.work(4, loud=True) == 8
    assert watch.take() == {"quiet": 1, "loud": 3}
    assert "work" not in vars(worker)
    with ticking(0, 1).around(Worker, "work", "class"):
        assert Worker.work is not Worker.__dict__.get("nothing")
        assert worker.work(1) == 2
    assert Worker.work.__name__ == "work"

import pytest

from cts_hf.timing import median_times


def test_runtimes_take_turns():
    calls = []
    runtimes = {name: lambda pixels, name=name: calls.append((name, pixels.sum().item())) for name in ("a", "b")}
    times = median_times(runtimes, (1, 3, 16, 16), rounds=3)
    assert list(times) == ["a", "b"]
    assert all(value >= 0 for value in times.values())
    assert [name for name, _ in calls] == ["a", "b", "b", "a"] * 2
    sums = [value for _, value in calls]
    assert sums[::2] == sums[1::2]  # the same images for both
    assert len(set(sums)) == 4  # new ones every turn


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        median_times({}, (1, 3, 16, 16), rounds=0)

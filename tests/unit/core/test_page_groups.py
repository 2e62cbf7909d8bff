"""Which layers share pages."""

import pytest

from llm.core.page_groups import PageGroup, group_layers


def test_layers_that_are_alike_are_one_group():
    assert group_layers([None] * 32) == [PageGroup(None, tuple(range(32)))]
    assert group_layers([128] * 4) == [PageGroup(128, (0, 1, 2, 3))]


@pytest.mark.parametrize(
    ("windows", "sizes"),
    [
        ([128, None] * 12, [12, 12]),  # gpt-oss
        (([512] * 5 + [None]) * 3, [3] * 6),  # Gemma 3 270M
        (([1024] * 5 + [None]) * 10 + [1024] * 2, [6, 4, 6, 6, 6, 6, 6, 6, 6, 6, 4]),  # Gemma 3 27B
        ([None] * 20 + [4096] * 3, [3, 3, 3, 3, 3, 3, 2, 3]),
        ([16, 8, 8, None], [1, 1, 1, 1]),
    ],
)
def test_groups_of_one_size_leave_little_of_a_page_unused(windows, sizes):
    groups = group_layers(windows)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    reach = [float("inf") if group.window is None else group.window for group in groups]
    assert reach == sorted(reach, reverse=True), "the first group sees furthest"
    assert len(groups) * max(sizes) <= 1.15 * len(windows)

"""listing.py: lists in error messages have a limited length."""

import pytest

from tiue_jax.training import changed_settings
from tiue_jax.training.listing import LENGTH, listed


def test_short_lists_are_whole():
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a; b; c" and listed(["a", "b"], ", ") == "a, b"


@pytest.mark.parametrize("length", [1, 40, 130, LENGTH - 1, LENGTH, LENGTH + 1, 10 * LENGTH])
def test_long_lists_are_cut_and_counted(length):
    items = [str(i % 10) * length for i in range(1000)]
    text = listed(items)
    *shown, more = text.split("; ")
    assert len(text) <= LENGTH + len("; and 1000 more") and more == f"and {len(items) - len(shown)} more"
    assert shown == items[: len(shown)] or (len(shown) == 1 and len(shown[0]) == LENGTH and shown[0].endswith(" ..."))


def test_a_run_that_is_resumed_by_another_recipe_is_told_in_600_characters():
    changes = [changed_settings.Change(f"distill.setting_{i}", "one value", "another") for i in range(50)]
    with pytest.raises(
        ValueError, match=r"settings differ .*: distill.setting_0 was 'one value', .*; and \d\d more; .*=.WHY.$"
    ) as e:
        changed_settings.check_changes(changes, None)
    assert len(str(e.value)) <= 600

"""Whether an update has left a router behind, by when replicas joined."""

from deployments.fleet.succession import Succession


def test_a_router_whose_version_is_on_its_first_list_is_outdated_once_another_version_joins():
    succession = Succession()
    succession.begin(1.0)
    succession.note(1.0, is_own=True)
    assert not succession.is_over
    succession.note(9.0, is_own=False)
    assert succession.is_over
    succession.note(1.0, is_own=True)  # an old one reports again
    assert succession.is_over


def test_a_new_router_is_not_outdated_by_the_replicas_before_it():
    """They are on its first list; and should its own replica die, the next one is of its version."""
    succession = Succession()
    succession.begin(1.0)
    succession.note(1.0, is_own=False)
    assert not succession.is_over
    succession.note(4.0, is_own=True)
    succession.begin(5.0)
    succession.note(1.0, is_own=False)
    assert not succession.is_over


def test_an_update_that_is_taken_back_brings_the_router_back():
    succession = Succession()
    succession.begin(1.0)
    succession.note(2.0, is_own=True)
    succession.note(3.0, is_own=False)
    succession.note(4.0, is_own=True)
    assert not succession.is_over

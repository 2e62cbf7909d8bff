"""The verdict on a replica: evidence in, what may go there out."""

from dataclasses import replace

import pytest

from deployments.channel.messages import Condition
from deployments.fleet.verdict import Evidence, Limits, Standing, judge

LIMITS = Limits(silence_timeout_s=2.0, stall_timeout_s=15.0, drain_after_s=10.0)
WELL = Evidence(is_listed=True, has_joined=True, is_same_version=True, silence_s=0.1)
LEAVING = replace(WELL, is_listed=False, delisted_s=1.0)
LAST = replace(LEAVING, is_last=True, delisted_s=11.0)


@pytest.mark.parametrize(
    ("evidence", "standing", "may_get_new", "may_keep", "must_be_replaced"),
    [
        (WELL, Standing.SERVING, True, True, False),
        (replace(WELL, has_joined=False), Standing.STARTING, False, True, False),
        (replace(WELL, has_reported=False, silence_s=9.0), Standing.STARTING, False, True, False),
        (replace(WELL, is_same_version=None), Standing.STARTING, False, True, False),
        (replace(WELL, is_same_version=False), Standing.OTHER_VERSION, False, True, False),
        (replace(WELL, silence_s=3.0), Standing.SILENT, False, True, False),
        (replace(WELL, silence_s=16.0), Standing.STALLED, False, False, True),
        (replace(WELL, condition=Condition("f", num_failed_steps=1)), Standing.DOUBTFUL, False, True, False),
        (replace(WELL, condition=Condition("f", failure="lost")), Standing.BROKEN, False, False, True),
        (replace(WELL, call_failed_s=0.2), Standing.DOUBTFUL, False, True, False),
        (replace(WELL, call_failed_s=5.0), Standing.SERVING, True, True, False),
        (replace(WELL, call_failed_s=5.0, silence_s=1.9), Standing.SERVING, True, True, False),
        (LEAVING, Standing.LEAVING, False, True, False),
        (replace(LEAVING, delisted_s=11.0), Standing.LEAVING, False, False, False),
        (replace(LEAVING, silence_s=3.0), Standing.GONE, False, True, False),
        (replace(LEAVING, silence_s=16.0), Standing.GONE, False, False, True),
        (LAST, Standing.STAYING, True, True, False),
        (replace(LAST, has_joined=False), Standing.STAYING, False, True, False),
        (replace(LAST, condition=Condition("f", num_failed_steps=1)), Standing.STAYING, False, True, False),
        (replace(LAST, call_failed_s=0.2), Standing.STAYING, False, True, False),
        (replace(LAST, silence_s=3.0), Standing.GONE, False, False, False),
        (replace(LAST, is_same_version=False), Standing.LEAVING, False, False, False),
        (replace(LAST, condition=Condition("f", failure="lost")), Standing.LEAVING, False, False, False),
    ],
)  # fmt: skip
def test_what_the_evidence_comes_to(evidence, standing, may_get_new, may_keep, must_be_replaced):
    verdict = judge(evidence, LIMITS)
    assert verdict.standing is standing
    assert (verdict.may_get_new, verdict.may_keep) == (may_get_new, may_keep)
    assert verdict.must_be_replaced is must_be_replaced
    assert verdict.why or verdict.may_get_new, "whatever keeps requests away is said"


def test_a_replica_is_believed_only_by_what_it_reports_after_a_failed_call():
    """The last report must be newer than the failure, by more than a report on its way takes."""
    before, after = replace(WELL, call_failed_s=1.0, silence_s=0.9), replace(WELL, call_failed_s=1.0, silence_s=0.1)
    assert judge(before, LIMITS).standing is Standing.DOUBTFUL
    assert judge(after, LIMITS).standing is Standing.SERVING


def test_requests_that_leave_a_replica_that_failed_are_told_from_those_of_one_that_is_taken_away():
    assert judge(replace(WELL, silence_s=16.0), LIMITS).is_failure
    assert judge(replace(WELL, condition=Condition("f", failure="lost")), LIMITS).is_failure
    assert not judge(replace(LEAVING, delisted_s=11.0), LIMITS).is_failure

"""A quota begins anew at midnight in UTC, as often as it should and never in between."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.usage.periods import Period, latest_reset, next_reset

moments = st.integers(946_684_800, 4_102_444_800).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


def test_without_a_period_there_is_no_reset() -> None:
    assert next_reset(Period.NONE, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)) is None


@given(st.sampled_from([Period.DAILY, Period.WEEKLY, Period.MONTHLY]), moments, moments)
def test_the_next_reset_is_a_midnight_within_one_period(period: Period, began: datetime, now: datetime) -> None:
    reset = next_reset(period, began, now)
    assert reset is not None
    assert reset > now
    assert (reset.hour, reset.minute, reset.second, reset.microsecond, reset.tzinfo) == (0, 0, 0, 0, UTC)
    longest = {Period.DAILY: 1, Period.WEEKLY: 7, Period.MONTHLY: 31}[period]
    assert reset - now <= timedelta(days=longest)
    following = next_reset(period, began, reset)
    assert following is not None
    assert following - reset >= timedelta(days={Period.DAILY: 1, Period.WEEKLY: 7, Period.MONTHLY: 28}[period])
    assert next_reset(period, began, reset - timedelta(microseconds=1)) == reset  # nothing in between is skipped


@given(st.sampled_from([Period.DAILY, Period.WEEKLY, Period.MONTHLY]), moments, moments)
def test_the_latest_reset_is_the_one_before_the_next(period: Period, began: datetime, now: datetime) -> None:
    latest = latest_reset(period, began, now)
    assert latest <= now
    assert next_reset(period, began, latest) == next_reset(period, began, now)


def test_without_a_period_all_counts_since_the_first_day() -> None:
    began = datetime(2026, 1, 1, 9, 30, tzinfo=UTC)
    assert latest_reset(Period.NONE, began, datetime(2026, 2, 1, tzinfo=UTC)) == datetime(2026, 1, 1, tzinfo=UTC)


@given(moments, moments)
def test_weeks_and_months_count_from_the_first_day(began: datetime, now: datetime) -> None:
    weekly, monthly = next_reset(Period.WEEKLY, began, now), next_reset(Period.MONTHLY, began, now)
    assert weekly is not None
    assert monthly is not None
    assert weekly.weekday() == began.weekday()
    last = (monthly + timedelta(days=1)).month != monthly.month
    assert monthly.day == began.day or (last and monthly.day < began.day)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ((2026, 1, 31, 9), (2026, 2, 28)),
        ((2026, 2, 27, 23), (2026, 2, 28)),
        ((2026, 2, 28, 0), (2026, 3, 31)),
        ((2026, 12, 31, 12), (2027, 1, 31)),
        ((2028, 2, 1, 0), (2028, 2, 29)),
    ],
)
def test_a_month_without_the_day_ends_on_its_last(now: tuple[int, ...], expected: tuple[int, ...]) -> None:
    began = datetime(2025, 10, 31, 9, 30, tzinfo=UTC)
    year, month, day, hour = now
    reset = next_reset(Period.MONTHLY, began, datetime(year, month, day, hour, tzinfo=UTC))
    assert reset is not None
    assert (reset.year, reset.month, reset.day) == expected


def test_other_time_zones_are_of_no_matter() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    now = datetime.fromisoformat("2026-03-10T23:30:00-05:00")  # the 11th in UTC
    assert next_reset(Period.DAILY, began, now) == datetime(2026, 3, 12, tzinfo=UTC)

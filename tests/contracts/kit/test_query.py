"""Threat 20: what a query may be."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from controller.contracts.kit import Model
from controller.contracts.kit.models import parse_query
from controller.errors import InvalidInput


class Page(Model):
    page: Annotated[int, Field(ge=1, le=10_000)] = 1
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    sort: Literal["name", "created_at"] = "name"
    share: float = 0


def test_a_good_query_is_read_and_unknown_parameters_are_ignored() -> None:
    assert parse_query(Page, "page=2&sort=created_at&utm_source=x&utm_source=y") == Page(page=2, sort="created_at")
    assert parse_query(Page, "") == Page()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("page=0", "page"),
        ("page=-1", "page"),
        ("page=1e9", "page"),
        ("page=", "page"),
        ("page=0x10", "page"),
        ("page=" + "9" * 5000, "page"),
        ("limit=1000000000", "limit"),
        ("sort=password", "sort"),
        ("sort=name;drop", "sort"),
        ("sort=name%00", "sort"),
        ("share=NaN", "share"),
        ("share=1e999", "share"),
        ("page=1&page=2", "page"),
        ("page=1&page=1", "page"),
        ("sort=%ff", "query"),
        ("&".join(f"a{number}=1" for number in range(101)), "query"),
    ],
)
def test_a_bad_parameter_is_named(query: str, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_query(Page, query)
    assert set(refused.value.problems) == {field}


def test_a_list_in_brackets_is_another_name() -> None:
    assert parse_query(Page, "page[]=7&page[0]=7&page%5b%5d=7") == Page()


@given(st.text(max_size=200))
def test_no_query_does_anything_else_than_pass_or_be_refused(text: str) -> None:
    try:
        page = parse_query(Page, text)
    except InvalidInput as refused:
        assert refused.problems
    else:
        assert 1 <= page.page <= 10_000 and 1 <= page.limit <= 100

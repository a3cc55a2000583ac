"""TLA+ values as TLC prints and reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.values import Value, parse, variables, write

names = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)
plain: st.SearchStrategy[Value] = st.one_of(
    st.booleans(), st.integers(-99, 99), st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]))
)
values: st.SearchStrategy[Value] = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner).map(tuple), st.dictionaries(names, inner, min_size=1)), max_leaves=12
)


@given(values)
def test_what_is_written_is_read_again(value: Value) -> None:
    assert parse(write(value)) == value


def test_a_state_as_tlc_prints_it() -> None:
    log = '/\\ log = ( r1 :> <<[k |-> "Opened"], [e |-> 1]>> @@\n  r2 :> <<>> )\n'
    text = log + "/\\ net = {a, [x |-> -1]}\n/\\ on = TRUE\n"
    assert variables(text) == {
        "log": {"r1": ({"k": "Opened"}, {"e": 1}), "r2": ()},
        "net": frozenset({"a", "[x |-> -1]"}),
        "on": True,
    }


@pytest.mark.parametrize("text", ["", "<<1", "[a 1]", "{1, ", "1 2", "§", "(a |-> 1)"])
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)

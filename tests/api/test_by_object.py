"""Values by object: found by identity, and gone with the object."""

import gc

import pytest
import torch

from svg2_compile.by_object import ByObject


class Thing:
    """Equal to all its like, as tensors are not even hashable by value."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]


def test_equal_objects_have_values_of_their_own():
    values: ByObject[str] = ByObject()
    one, other = Thing(), Thing()
    assert values.set(one, "one") == "one"
    assert (values.get(one), values.get(other)) == ("one", None)
    assert values.setdefault(one, "again") == "one"
    assert values.setdefault(other, "other") == "other"
    assert [each is key for each, key in zip(values.keys(), (one, other), strict=True)] == [True, True]


@pytest.mark.parametrize("make", [Thing, lambda: torch.zeros(3)])
def test_a_value_goes_with_its_object(make):
    values: ByObject[Thing] = ByObject()
    kept: ByObject[str] = ByObject()
    key, value = make(), Thing()
    kept.set(value, "alive")
    values.set(key, value)
    del key, value
    gc.collect()
    assert values.keys() == []
    assert kept.keys() == []


def test_an_object_at_the_place_of_one_that_is_gone_has_no_value():
    values: ByObject[int] = ByObject()
    for number in range(200):
        thing = Thing()  # gets the memory of one before it
        assert values.get(thing) is None
        values.set(thing, number)
        assert values.get(thing) == number
        del thing
    assert values.keys() == []

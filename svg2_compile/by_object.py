"""Values by live objects, at the price of a dictionary of numbers.

The weak dictionaries of the library and of torch make a reference and compare it at each look-up, which is too slow
for what every layer of a model asks. Here an object's ``id`` is looked up, and the object that it stood for must be
the same still.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class _Key(weakref.ref[Any]):
    """A weak reference that remembers the ``id`` of what is gone."""

    __slots__ = ("number",)
    number: int


class ByObject(Generic[Value]):
    """A mapping from objects, told apart by identity, that does not keep them alive; its values go when they go."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[_Key, Value]] = {}

    def get(self, key: object) -> Value | None:
        """Return the value of an object; None where it has none."""
        found = self._found.get(id(key))
        return found[1] if found is not None and found[0]() is key else None

    def set(self, key: object, value: Value) -> Value:
        """Give an object a value, and return that."""
        self._found[id(key)] = self._entry(key, value)
        return value

    def setdefault(self, key: object, value: Value) -> Value:
        """Return the value of an object, which is ``value`` where it had none; of two threads one decides."""
        entry = self._entry(key, value)
        found = self._found.setdefault(id(key), entry)
        if found[0]() is not key:
            found = self._found[id(key)] = entry
        return found[1]

    def keys(self) -> list[Any]:
        """Return the objects that have values, in the order in which they got them."""
        return [key for reference, _ in list(self._found.values()) if (key := reference()) is not None]

    def _entry(self, key: object, value: Value) -> tuple[_Key, Value]:
        reference = _Key(key, self._drop)
        reference.number = id(key)
        return reference, value

    def _drop(self, reference: Any) -> None:
        # no global name is asked for: objects go while the interpreter ends
        found = self._found.get(reference.number)
        # another object may have got the number by now
        if found is not None and found[0] is reference:
            del self._found[reference.number]

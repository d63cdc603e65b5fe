"""ReadOnly: an attribute of a Clipper, with its type, its documentation, and a hint for whoever assigns to it."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

from .engine import Engine
from .refusals import READ_ONLY

T = TypeVar("T")


class ReadOnly(Generic[T]):
    """An attribute that ``get`` reads in the engine. Assigning is an AttributeError with ``hint``: what to do instead.

    No subclass of property, for which help() would not show ``doc`` (Python 3.11).
    """

    def __init__(self, get: Callable[[Engine], T], doc: str, hint: str = READ_ONLY) -> None:
        self._get, self._hint = get, hint
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{owner.__name__}.{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Self | T:
        return self if instance is None else self._get(instance.engine)

    def __set__(self, instance: object, value: object) -> None:
        raise AttributeError(f"{self._name} is read-only: {self._hint}")

    def __delete__(self, instance: object) -> None:
        raise AttributeError(f"{self._name} is read-only: {self._hint}")

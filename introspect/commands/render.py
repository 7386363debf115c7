"""From typed results to text and JSON-able values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["amount_text", "columns", "jsonable", "members", "size_text"]


def columns(rows: Iterable[Sequence[str]], indent: str = "") -> list[str]:
    """Lines with every column but the last padded to its widest cell."""
    table = list(rows)
    if not table:
        return []
    widths = tuple([max(map(len, column)) for column in zip_longest(*table, fillvalue="")])
    return [(_template(indent, widths[: len(row)]) % tuple(row)).rstrip() for row in table]


@lru_cache(1024)
def _template(indent: str, widths: tuple[int, ...]) -> str:
    """A line, for `%`."""
    return indent.replace("%", "%%") + "  ".join([f"%-{width}s" for width in widths])


def members(value: "DataclassInstance") -> dict[str, object]:
    """A dataclass as an object: its fields by name, but those that repr leaves out."""
    return {field.name: jsonable(getattr(value, field.name)) for field in fields(value) if field.repr}


def jsonable(value: object) -> object:
    """Dataclasses and named tuples as objects, other sequences as arrays, the rest as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return members(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def size_text(size: int) -> str:
    """"4 KiB", "2 MiB", "1 GiB"."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and not size & (1 << shift) - 1:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


def amount_text(size: int) -> str:
    """A size that need not be a power of two: "12 KiB", "2052 KiB", "1.5 TiB". Less than a KiB is in bytes."""
    if size < 1 << 10:
        return f"{size} bytes"
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if not size & (1 << shift) - 1:
            return f"{size >> shift} {unit}"
        if size >> shift >= 100 and shift > 10:
            return f"{size / (1 << shift):.1f} {unit}"
    return f"{size / 1024:.1f} KiB"

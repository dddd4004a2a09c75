"""Bit-widths that bring a group size of their own, beside those that do not.

Where several group sizes are to choose from, a candidate of a layer is a bit-width and a group
size. Proxies do arithmetic on bit-widths, so such a candidate is a whole number like any other;
only what rounds asks for its groups (`proxyq.quantize.resolved`).
"""

import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from proxyq.errors import UsageError, shown

BITS = (*range(1, 9), 16)
LEAST_GROUP = 8
CHANNEL = "channel"
"""How people write that an output channel has one grid."""
GroupSize = int | None
Written = int | str


class GroupedBits(int):
    """A bit-width for weights rounded in groups of `group_size`; it prints as `4g64`.

    It reckons and compares by size as the plain bit-width does, but is equal to nothing but the
    same bit-width with the same groups: both may be keys of one dictionary.
    """

    group_size: int

    def __new__(cls, bits: int, group_size: int) -> "GroupedBits":
        self = super().__new__(cls, check_bits(int(bits)))
        self.group_size = check_group_size(group_size)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupedBits) and self._key == other._key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return f"{int(self)}g{self.group_size}"

    __repr__ = __str__

    def __getnewargs__(self) -> tuple[int, int]:
        return self._key

    @property
    def _key(self) -> tuple[int, int]:
        return int(self), self.group_size


def check_bits(bits: Any, name: str = "bits") -> int:
    """Refuse a bit-width that no grid has, and one that brings a group size."""
    if isinstance(bits, bool) or not isinstance(bits, Integral) or bits not in BITS:
        raise UsageError(f"`{name}` must be 1 to 8 or 16, got {bits!r}.")
    return int(bits)


def check_group_size(size: Any) -> int:
    """Refuse a size of groups that there is not."""
    if type(size) is not int or size < LEAST_GROUP:
        raise UsageError(
            f"`group_size` must be a whole number of at least {LEAST_GROUP}, such as 32, 64 or "
            f"128, or None, got {size!r}."
        )
    return size


def with_groups(bits: int, group_size: GroupSize) -> int:
    """A bit-width with groups of that size, or plain without one."""
    return int(bits) if group_size is None else GroupedBits(bits, group_size)


def group_of(bits: int) -> GroupSize:
    """The group size that a bit-width brings, if it brings one."""
    return bits.group_size if isinstance(bits, GroupedBits) else None


def groups_of_all(bits: Iterable[int]) -> tuple[GroupSize, ...] | None:
    """The group size of each; `None` where none of them brings one."""
    found = tuple(map(group_of, bits))
    return found if any(found) else None


def by_size(bits: int) -> tuple[int, tuple[bool, int]]:
    """What sorts candidates: by bits, then by what the scales take, one a channel first."""
    return int(bits), _by_scales(group_of(bits))


def _by_scales(size: GroupSize) -> tuple[bool, int]:
    return size is not None, -(size or 0)


def candidates(bits: Iterable[int], group_sizes: Sequence[GroupSize] = ()) -> tuple[int, ...]:
    """All pairs of a bit-width and a group size, in order.

    One grid a channel is always among them: it is all that convolutions can have.
    """
    sizes = {None, *group_sizes}
    found = {with_groups(b, size) for b in bits for size in sizes}
    return tuple(sorted(found, key=by_size))


def written(bits: Iterable[int]) -> list[Written]:
    """As plain JSON: whole numbers, and `"4g64"` where there are groups."""
    return [str(b) if isinstance(b, GroupedBits) else int(b) for b in bits]


def read(texts: Iterable[Written]) -> tuple[int, ...]:
    """What `written` wrote."""
    return tuple(parse(text) if isinstance(text, str) else text for text in texts)


def parse(text: str) -> int:
    """`4` or `4g64`.

    **Raises** `ValueError` where it is neither, `UsageError` for numbers that there are not.
    """
    match = re.fullmatch(r"\s*(\d+)g(\d+)\s*", text)
    return int(text) if match is None else GroupedBits(int(match[1]), int(match[2]))


def check_group_sizes(given: Any) -> tuple[GroupSize, ...]:
    """Group sizes to choose from, in order: `None` is one grid a channel.

    **Raises** `UsageError` for none, for one that is named twice, and for sizes that there are not.
    """
    sizes = tuple(given)
    if not sizes:
        raise UsageError(
            "`group_size` must name at least one size, or None for one grid a channel."
        )
    checked = tuple(None if size is None else check_group_size(size) for size in sizes)
    if len(set(checked)) < len(checked):
        twice = next(size for size in checked if checked.count(size) > 1)
        raise UsageError(f"`group_size` names {shown(twice or CHANNEL)} twice; name each once.")
    return tuple(sorted(checked, key=_by_scales))

"""Budgets as users write them: `size=3bit`, `size=1.5MiB`, `bops=75G`, `latency=3.2ms`,
`activation-memory=512KiB`, `size=50%`. What each counts: `docs/budgets.md`.

Amounts are exact fractions of what was typed; a budget in whole bits (operations, picoseconds)
is that amount rounded down, so rounding never grants more than was asked. A share, `size=50%`,
is that part of the way from the least to the greatest amount that the candidates reach (r = 0.5
in the programs of HAWQ-V3, arXiv:2011.10680).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from proxyq.errors import UsageError, near

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
PICOSECONDS = {"s": 10**12, "ms": 10**9, "us": 10**6}
AVERAGE, SHARE = "bit", "%"
# Raw amounts (bits, operations, picoseconds) per unit; None: known with the layers only.
UNITS: dict[str, dict[str, int | None]] = {
    "size": {AVERAGE: None, **{unit: 8 * count for unit, count in BYTES.items()}, SHARE: None},
    "bops": {**COUNTS, SHARE: None},
    "macs-bits": {**COUNTS, SHARE: None},
    "latency": {**PICOSECONDS, SHARE: None},
    "activation-memory": {**{unit: 8 * count for unit, count in BYTES.items()}, SHARE: None},
}
_AMOUNT = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?\s*([A-Za-z]*|%)\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most `amount` of `unit` of `kind`; `text` is what the user typed."""

    kind: str
    amount: Fraction
    unit: str
    text: str

    def per_unit(self, searched_weights: int) -> Fraction:
        """Raw amounts in one unit; `size` in `bit` is per searched weight, a share has none."""
        raw = UNITS[self.kind][self.unit]
        return Fraction(searched_weights if raw is None else raw)

    @property
    def is_average(self) -> bool:
        """Whether this is an average per searched weight, which leaves pinned layers out."""
        return self.unit == AVERAGE

    @property
    def is_share(self) -> bool:
        """Whether this is a share of the way from the least to the greatest reachable amount."""
        return self.unit == SHARE

    def __str__(self) -> str:
        return self.text


def share_of(low: int, high: int, percent: Fraction) -> int:
    """The whole raw amount that lies this share of the way from `low` to `high`, rounded down."""
    # low + r (high - low)
    return low + int((high - low) * percent / 100)


def raw_budget(kind: str, amount: int) -> Budget:
    """A budget of a whole raw amount: bits, operations, picoseconds."""
    unit = {"size": "B", "activation-memory": "B", "latency": "us"}.get(kind, "")
    per_unit = UNITS[kind][unit]
    assert per_unit is not None
    return Budget(kind=kind, amount=Fraction(amount, per_unit), unit=unit, text=f"{kind}={amount}")


def parse_budget(text: str) -> Budget:
    """`KIND=AMOUNT UNIT` to a `Budget`.

    **Raises** `UsageError`: unknown kind or unit (with near misses), an amount that is not a
    positive finite number.
    """
    kind, equals, rest = text.partition("=")
    kind = kind.strip()
    if not equals:
        raise UsageError(f"a budget must look like 'size=3bit' or 'bops=75G', got {text!r}.")
    if kind not in UNITS:
        raise UsageError(f"unknown budget {kind!r}: {near(kind, list(UNITS))}")
    return Budget(kind=kind, text=text.strip(), **_amount(kind, rest, text))


def parse_budgets(texts: str | Iterable[str]) -> tuple[Budget, ...]:
    """One budget or several."""
    return tuple(map(parse_budget, [texts] if isinstance(texts, str) else texts))


def parse_budget_range(text: str) -> tuple[Budget, Budget]:
    """`size=2.5bit..6bit` to the budgets at its ends, in one unit, the smaller first."""
    kind, _, rest = text.partition("=")
    ends = rest.split("..")
    if len(ends) != 2:
        raise UsageError(f"a range of budgets must look like 'size=2.5bit..6bit', got {text!r}.")
    low, high = (parse_budget(f"{kind}={end}") for end in ends)
    if low.unit != high.unit:
        raise UsageError(f"both ends of {text!r} must have the same unit.")
    if low.amount >= high.amount:
        raise UsageError(f"a range of budgets must grow from left to right, got {text!r}.")
    return low, high


def budget_steps(text: str, points: int) -> tuple[Budget, ...]:
    """`points` budgets evenly from one end of a range to the other, both included."""
    low, high = parse_budget_range(text)
    if points < 2:
        raise UsageError(f"`points` must be at least 2, got {points}.")
    steps = []
    for step in range(points):
        amount = low.amount + (high.amount - low.amount) * Fraction(step, points - 1)
        shown = f"{low.kind}={float(amount):.6g}{low.unit}"
        steps.append(Budget(kind=low.kind, amount=amount, unit=low.unit, text=shown))
    return tuple(steps)


_EXAMPLES = {
    "size": "3bit, 1.5MiB or 50%",
    "latency": "3.2ms",
    "activation-memory": "512KiB or 50%",
}


def _amount(kind: str, rest: str, text: str) -> dict:
    """`amount` and `unit` of `3bit`."""
    match = _AMOUNT.match(rest)
    if match is None:
        raise UsageError(
            f"the amount in the budget {text!r} must be a positive number and a unit, like "
            f"{_EXAMPLES.get(kind, '75G')}."
        )
    number, exponent, unit = match[1], match[2] or "", match[3]
    if kind == "size" and unit == "bits":
        unit = "bit"
    if unit not in UNITS[kind]:
        known = [name for name in UNITS[kind] if name]
        if not unit:
            raise UsageError(f"the budget {text!r} needs a unit: {_list(known)}.")
        raise UsageError(f"unknown unit {unit!r} in the budget {text!r}: {near(unit, known)}")
    amount = Fraction(number + exponent)
    if unit == SHARE:
        if amount > 100:
            raise UsageError(f"a share must be 0% to 100%, got the budget {text!r}.")
    elif amount <= 0:
        raise UsageError(f"the budget {text!r} must be more than zero.")
    return {"amount": amount, "unit": unit}


def _list(names: Iterable[str]) -> str:
    *most, last = names
    return ", ".join(most) + " or " + last

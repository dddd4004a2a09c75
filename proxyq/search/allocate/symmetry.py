"""Variables that may be exchanged for each other: of plans that differ so, one is enough.

Without it a proof looks at every arrangement of what is the same plan. Of variables that are
alike the earlier ones get the higher columns, as in `reduce.canonical`.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from proxyq.search.allocate.quadratic import Quadratic


def alike(program: Quadratic) -> list[list[np.ndarray]]:
    """Sets of two or more variables alike, each variable as its choices, in order."""
    parts = np.split(np.arange(len(program.variable)), program.first[1:])
    classes: dict[bytes, list[list[np.ndarray]]] = {}
    for own in parts:
        key = [program.column[own], program.unary[own], program.usage[:, own]]
        found = classes.setdefault(b"".join(array.tobytes() for array in key), [])
        for members in found:
            if _exchangeable(program.pair, members[0], own):
                members.append(own)
                break
        else:
            found.append([own])
    return [members for found in classes.values() for members in found if len(members) > 1]


def _exchangeable(pair: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the choices `a` may be exchanged for the choices `b` of another variable."""
    between = pair[np.ix_(a, b)]
    rest = np.ones(len(pair), bool)
    rest[a] = rest[b] = False
    return bool((between == between.T).all() and (pair[a][:, rest] == pair[b][:, rest]).all())


def in_order(open_: np.ndarray, classes: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """`open_` without choices that no plan in order takes; some variables may be left with none."""
    open_ = open_.copy()
    for members in classes:
        steps = list(itertools.pairwise(members))
        for higher, lower in steps:
            at = np.flatnonzero(open_[higher])
            open_[lower[at[-1] + 1 :] if len(at) else lower] = False
        for higher, lower in reversed(steps):
            at = np.flatnonzero(open_[lower])
            open_[higher[: at[0]] if len(at) else higher] = False
    return open_


def arranged(taken: np.ndarray, classes: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The same plan in order: choice per variable, `[variables]`."""
    taken = taken.copy()
    for members in classes:
        at = [int(np.flatnonzero(np.isin(taken, own))[0]) for own in members]
        ranks = np.sort([taken[g] - own[0] for g, own in zip(at, members, strict=True)])[::-1]
        taken[at] = [own[rank] for own, rank in zip(members, ranks, strict=True)]
    return taken

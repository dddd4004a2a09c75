"""Good plans for coupled layers by local search: moves of one variable, and of two together.

From every start: while a move of one variable, or of two variables at once, lowers the
objective within all limits, do the best of them. Two at once keep a budget used up: one
variable gives what the other takes. Half of the starts are random, half are the best plan
so far with some variables changed at random. A start outside the limits first descends into
them, by the move with the least cost per unit of violation removed. Limits are kept in exact
integers, and a seed gives the same plan every time.

With h = unary + 2 pair x, a move from a to a' changes the objective by d[a'] = h[a'] - h[a], and
two moves, of two variables, from a to a' and b to b' by

    d[a'] + d[b'] + 2 (pair[a', b'] - pair[a', b] - pair[a, b'] + pair[a, b]).
"""

import time

import numpy as np

from proxyq.search.allocate.quadratic import Quadratic

# First moves tried in pairs: the cheapest alone. The other halves are all moves.
PAIR_MOVES = 128
# What a kick changes: this share of the variables, two at least.
KICK = 0.15


def local_search(
    program: Quadratic, known: np.ndarray, *, starts: int, seed: int, deadline: float
) -> np.ndarray:
    """The best choices `[variables]` found from `known`, which fits, and `starts - 1` others.

    `deadline` is a time of `time.perf_counter()`; the same answer each time if it is not met.
    """
    search = Search(program, deadline)
    rng = np.random.default_rng(seed)
    best = search.descend(known)
    value = program.value(best)
    for number in range(1, starts):
        if time.perf_counter() > deadline:
            break
        start = search.drawn(rng, None if number % 2 else best)
        inside = search.into_limits(start)
        taken = search.descend(known if inside is None else inside)
        reached = program.value(taken)
        if reached < value:
            best, value = taken, reached
    return best


class Search:
    """The moves, and what they need to know of a problem."""

    def __init__(self, program: Quadratic, deadline: float) -> None:
        self.program, self.deadline = program, deadline
        self.variable, self.pair = program.variable, program.pair
        self.usage, self.room = program.usage, program.room
        # What one unit of each limit is worth, so that limits compare.
        self.weights = 1.0 / np.maximum(self.room.astype(np.float64), 1.0)

    def drawn(self, rng: np.random.Generator, base: np.ndarray | None) -> np.ndarray:
        """Random choices: for all variables, or for some of those of `base`."""
        first = self.program.first
        taken = rng.integers(first, np.append(first[1:], len(self.variable)))
        if base is None:
            return taken
        count = len(base)
        changed = rng.permutation(count)[: max(2, round(KICK * count))]
        kicked = base.copy()
        kicked[changed] = taken[changed]
        return kicked

    def field(self, taken: np.ndarray) -> np.ndarray:
        """h = unary + 2 pair x, `[choices]`."""
        return self.program.unary + 2 * self.pair[taken].sum(axis=0)

    def into_limits(self, taken: np.ndarray) -> np.ndarray | None:
        """Down from `taken` until every limit holds; None where stuck."""
        taken, used = taken.copy(), self.usage[:, taken].sum(axis=1)
        h = self.field(taken)
        while (used > self.room).any():
            now = taken[self.variable]
            after = used[:, None] + self.usage - self.usage[:, now]
            over = self.weights @ np.maximum(after - self.room[:, None], 0)
            violation = float(self.weights @ np.maximum(used - self.room, 0))
            removed = violation - over
            helps = removed > 1e-12 * violation
            if not helps.any():
                return None
            extra = h - h[now]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                # Moves that even save cost come first, by how much they save.
                rate = np.where(extra > 0, extra / removed, extra * removed)
                move = int(np.where(helps, rate, np.inf).argmin())
            used = after[:, move]
            h += 2 * (self.pair[move] - self.pair[now[move]])
            taken[self.variable[move]] = move
        return taken

    def descend(self, taken: np.ndarray) -> np.ndarray:
        """From choices that fit to choices that no move, or pair of moves, makes better."""
        taken, h = taken.copy(), self.field(taken)
        while time.perf_counter() < self.deadline:
            now = taken[self.variable]
            extra = h - h[now]
            change = self.usage - self.usage[:, now]
            left = (self.room - self.usage[:, taken].sum(axis=1))[:, None]
            # Sums of h round; what they cannot tell from zero is no gain.
            least = -1e-13 * float(np.abs(h[taken]).sum())
            alone = np.where((change <= left).all(axis=0), extra, np.inf)
            moves = [int(alone.argmin())]
            if not alone[moves[0]] < least:
                gain, moves = self.best_pair(now, extra, change, left)
                if not gain < least:
                    break
            for move in moves:
                h += 2 * (self.pair[move] - self.pair[taken[self.variable[move]]])
                taken[self.variable[move]] = move
        return taken

    def best_pair(
        self, now: np.ndarray, extra: np.ndarray, change: np.ndarray, left: np.ndarray
    ) -> tuple[float, list[int]]:
        """The pair of moves of two variables that changes the objective least, within limits."""
        others = np.flatnonzero(now != np.arange(len(now)))
        if not len(others):
            return np.inf, []
        rows = others[np.argsort(extra[others], kind="stable")[:PAIR_MOVES]]
        # The rows of pair[a'] - pair[a], then the columns of the same at b' and b.
        between = self.pair[rows] - self.pair[now[rows]]
        total = extra[rows][:, None] + extra + 2 * (between - between[:, now])
        ok = self.variable[rows][:, None] != self.variable
        for own, room in zip(change, left, strict=True):
            ok &= own[rows][:, None] <= room - own
        total[~ok] = np.inf
        best = int(total.argmin())
        row, column = divmod(best, len(now))
        return float(total.flat[best]), [int(rows[row]), column]

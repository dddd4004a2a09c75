"""Random allocation problems with couplings, and what is best in them by looking at all plans."""

import itertools

import numpy as np

from proxyq.search.allocate import Limit, Problem

KINDS = ("gram", "low rank", "indefinite", "integers", "diagonal", "apart", "zero")


def coupled_problem(
    seed: int, *, kind: str | None = None, limits: int | None = None, most: int = 5000
) -> Problem:
    """Up to 8 layers, 4 columns, 4 limits and `most` plans; masks, groups, any scale and sign."""
    rng = np.random.default_rng(seed)
    kind = kind or str(rng.choice(KINDS))
    columns = int(rng.integers(1, 5))
    layers = int(rng.integers(1, 9))
    while columns**layers > most:
        layers -= 1
    bits = np.sort(rng.choice([1, 2, 3, 4, 5, 6, 8, 16], columns, replace=False))
    shape, size = (layers, columns), layers * columns
    own = (rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits).ravel()
    cost = np.zeros(shape) if rng.random() < 0.5 else rng.normal(size=shape) * own.mean()
    if kind in ("gram", "low rank"):
        directions = rng.normal(size=(size, 2 if kind == "low rank" else size))
        directions += rng.choice([0.0, 1.0]) * rng.normal(size=directions.shape[1])
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        coupling = directions @ directions.T * np.sqrt(np.outer(own, own))
    elif kind == "indefinite":
        coupling = rng.normal(size=(size, size)) * np.sqrt(np.outer(own, own))
    elif kind == "integers":
        factor = rng.integers(-2, 3, (size, 3)).astype(float)
        coupling, cost = factor @ factor.T, rng.integers(-1, 3, shape).astype(float)
    elif kind == "diagonal":
        coupling = np.diag(own)
    elif kind == "apart":  # no couplings but within layers
        factor = rng.normal(size=(size, size)) * (
            np.arange(size)[:, None] // columns == np.arange(size) // columns
        )
        coupling = factor @ factor.T
    else:
        coupling = np.zeros((size, size))
    scale = 10.0 ** rng.integers(-9, 10)
    allowed = rng.random(shape) < 0.85
    allowed[np.arange(layers), rng.integers(columns, size=layers)] = True
    grouped: list[tuple[int, ...]] = []
    if layers > 2 and rng.random() < 0.4:
        members = rng.choice(layers, int(rng.integers(2, layers)), replace=False)
        if allowed[members].all(axis=0).any():
            grouped.append(tuple(map(int, members)))
    found = []
    for m in range(int(rng.integers(0, 5)) if limits is None else limits):
        if rng.random() < 0.7:
            usage = rng.integers(1, 10 ** int(rng.integers(1, 13)), (layers, 1)) * bits
        else:
            usage = rng.integers(0, 50, shape)
        low = int(np.where(allowed, usage, usage.max()).min(axis=1).sum())
        high = int(np.where(allowed, usage, 0).max(axis=1).sum())
        fixed = int(rng.integers(0, 3)) * 7
        budget = int(low + (high - low) * rng.uniform(-0.02, 1.1)) + fixed
        found.append(Limit(name=f"limit{m}", usage=usage, budget=budget, fixed=fixed))
    return Problem(
        layers=tuple(f"layer{i}" for i in range(layers)),
        bits=tuple(map(int, bits)),
        cost=cost * scale,
        coupling=(coupling + coupling.T) / 2 * scale,
        allowed=allowed,
        limits=tuple(found),
        groups=tuple(grouped),
    )


def plans(problem: Problem) -> np.ndarray:
    """All plans within the limits, column per layer, `[plans, layers]`."""
    units = problem.decisions
    open_ = [np.flatnonzero(problem.allowed[list(own)].all(axis=0)) for own in units]
    columns = np.array(list(itertools.product(*open_)))
    every = np.zeros((len(columns), len(problem.layers)), int)
    for g, own in enumerate(units):
        every[:, list(own)] = columns[:, [g]]
    layer = np.arange(len(problem.layers))
    for limit in problem.limits:
        every = every[limit.usage[layer, every].sum(axis=1) + limit.fixed <= limit.budget]
    return every


def values(problem: Problem, every: np.ndarray) -> np.ndarray:
    """The objective of each plan, `[plans]`."""
    layer = np.arange(len(problem.layers))
    total = problem.cost[layer, every].sum(axis=1)
    if problem.coupling is not None:
        rows = layer * len(problem.bits) + every
        total = total + problem.coupling[rows[:, :, None], rows[:, None, :]].sum(axis=(1, 2))
    return total


def rounding(problem: Problem) -> float:
    """What the objectives of two computations may differ by."""
    coupling = 0.0 if problem.coupling is None else float(np.abs(problem.coupling).max())
    cost = float(np.abs(problem.cost[problem.allowed]).max())
    return 1e-12 * len(problem.layers) ** 2 * (coupling + cost)

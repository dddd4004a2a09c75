"""A network in pieces that are differentiable in their weights: layers, or blocks.

A piece is a run of equations, a function of the tensors that it reads and of its sites' weights,
offsets and grids. Cut before every layer, pieces are single layers with what follows them;
cut where one tensor alone lives, they are blocks: what stands between two points that everything
flows through, such as a residual block. Equal pieces share compiled programs by their `key`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from proxyq.engine.segments import Edit, rounding_products, run_site, text_key
from proxyq.model.attention import Product
from proxyq.model.graph import Env, Equation, Var, evaluate, is_literal
from proxyq.model.network import Network
from proxyq.quantize import Grid


class PieceEdits(NamedTuple):
    """How a piece runs: `sites` have a weight each; `attention`: the grids of the operands of its
    products of two activations, one pair or `None` for each, or `()`."""

    sites: Sequence[Edit]
    attention: Sequence[tuple[Grid, Grid] | None] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Main equations from one cut to the next.

    - `sites`: indices of the sites inside, in order.
    - `attention`: indices in `network.attention` of the products inside, in order.
    - `constants`: frontier variables read, but for the sites' own weights; `reads`: tensors of
      earlier pieces read; `writes`: what later pieces (or the outputs) read.
    - `keeps`: tensors of earlier pieces that later ones read still.
    """

    network: Network
    sites: tuple[int, ...]
    eqns: tuple[Equation, ...]
    attention: tuple[int, ...]
    constants: tuple[Var, ...]
    reads: tuple[Var, ...]
    writes: tuple[Var, ...]
    keeps: frozenset[Var]
    key: str

    def __call__(
        self, edits: PieceEdits, constants: Sequence[Any], reads: Sequence[Any]
    ) -> list[Any]:
        """What it writes."""
        env: Env = dict(zip(self.constants, constants, strict=True))
        env.update(zip(self.reads, reads, strict=True))
        mine = {id(self.network.graph.main[self.network.sites[i].position]): i for i in self.sites}
        beside = dict(zip(self.sites, edits.sites, strict=True))
        products = [self.network.graph.main[p.position] for p in self._products]
        rule = rounding_products(products, edits.attention)
        plain: list[Equation] = []
        for eqn in self.eqns:
            index = mine.get(id(eqn))
            if index is None:
                plain.append(eqn)
                continue
            evaluate(plain, env, rule)
            plain = []
            edit = beside[index]
            site = self.network.sites[index]
            env[eqn.outvars[0]] = run_site(site, eqn, env, edit.weight, edit)
        evaluate(plain, env, rule)
        return [env[var] for var in self.writes]

    @property
    def _products(self) -> list[Product]:
        return [self.network.attention[i] for i in self.attention]


def layer_pieces(network: Network) -> tuple[Piece, ...]:
    """The head before the first layer, if anything is there, then a piece for each layer."""
    return _pieces(network, [site.position for site in network.sites])


def block_pieces(network: Network) -> tuple[Piece, ...]:
    """Pieces between the points at which a single tensor lives: of several between two layers,
    the last one, where the activation is done."""
    narrow = [position for position, live in enumerate(_live(network)) if len(live) == 1]
    places = [site.position for site in network.sites]
    cuts = []
    for before, after in pairwise(places):
        between = [position for position in narrow if before < position <= after]
        cuts += between[-1:]
    return _pieces(network, cuts)


def _live(network: Network) -> list[set[Var]]:
    """For each position in main, and its end: the tensors made before that are read from there."""
    graph = network.graph
    known = set(graph.frontier)
    needed = {atom for atom in graph.outputs if not is_literal(atom) and atom not in known}
    live = [set(needed)]
    for eqn in reversed(graph.main):
        needed -= set(eqn.outvars)
        needed |= {a for a in eqn.invars if not is_literal(a) and a not in known}
        live.append(set(needed))
    return live[::-1]


def _pieces(network: Network, cuts: Sequence[int]) -> tuple[Piece, ...]:
    graph = network.graph
    live, frontier = _live(network), set(graph.frontier)
    ends = sorted({0, *cuts, len(graph.main)})
    pieces = []
    for start, stop in pairwise(ends):
        eqns = graph.main[start:stop]
        sites = tuple(i for i, s in enumerate(network.sites) if start <= s.position < stop)
        made = {var for eqn in eqns for var in eqn.outvars}
        own = {id(graph.main[network.sites[i].position]): network.sites[i].operand for i in sites}
        operands = dict.fromkeys(
            atom
            for eqn in eqns
            for place, atom in enumerate(eqn.invars)
            if not is_literal(atom) and own.get(id(eqn)) != place
        )
        constants = tuple(var for var in operands if var in frontier)
        reads = tuple(var for var in operands if var not in frontier and var not in made)
        writes = tuple(v for eqn in eqns for v in eqn.outvars if v in live[stop])
        weights = tuple(dict.fromkeys(network.sites[i].weight for i in sites))
        where = " ".join(
            f"{network.sites[i].position - start}:{own_of}"
            for i, own_of in zip(sites, own.values(), strict=True)
        )
        inside = [i for i, p in enumerate(network.attention) if start <= p.position < stop]
        where += "".join(f" x{network.attention[i].position - start}" for i in inside)
        pieces.append(
            Piece(
                network=network,
                sites=sites,
                eqns=eqns,
                attention=tuple(inside),
                constants=constants,
                reads=reads,
                writes=writes,
                keeps=frozenset(live[stop] - made),
                key=where + "\n" + text_key(eqns, (*weights, *constants, *reads), writes),
            )
        )
    return tuple(pieces)

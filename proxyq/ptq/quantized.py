"""Apply bits to a network: which site gets which rounded weight, offset and input grid."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.engine import Edit, Edits, Engine
from proxyq.engine.ranges import ActivationGrids
from proxyq.engine.rounded import site_width
from proxyq.errors import UsageError, near
from proxyq.model.attention import Product
from proxyq.model.model import Model
from proxyq.model.network import Network
from proxyq.quantize import Grid, Rounding, check_bits
from proxyq.quantize.integers import Integers, to_integers
from proxyq.search.allocate.plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedModel:
    """A model with rounded weights (and, if asked, rounded inputs of its layers).

    - `bits`: weight bits by layer; layers that are not named stay in floating point.
      `activation_bits`: of the inputs that are rounded; `attention_bits`: of the operands of
      products of two activations, by the product.
    - `integers`: each site's weight as whole numbers `[fan_in, channels]`, by the site's index in
      the network; its edit holds just their values.
    - `edits`: what replaces each site's weight and input, and what is added to its output; they
      fit the model at every batch size.
    - `correction`: which correction of layer statistics is inside, and `reconstruction`: how the
      rounding was found (`nearest`, `bias`, `adaround`, `block`). `notes` about both.
    - `plan`: the plan that was applied, where it is known.
    """

    model: Model
    bits: Mapping[str, int]
    edits: Edits
    integers: Mapping[int, Integers] = field(default_factory=dict)
    activation_bits: Mapping[str, int] = field(default_factory=dict)
    attention_bits: Mapping[str, int] = field(default_factory=dict)
    correction: str = "none"
    reconstruction: str = "nearest"
    notes: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    def logits(self, inputs: Any, *, memory: int | None = None) -> np.ndarray:
        """The network's first output on a set of inputs, `[images, …]`."""
        engine = Engine.build(self.model, len(jax.tree.leaves(inputs)[0]), memory=memory)
        return engine.logits(inputs, self.edits)


def integer_weights(
    engine: Engine, bits: Mapping[str, int], rounding: Rounding | None = None
) -> dict[int, Integers]:
    """Each named layer's weights rounded to nearest, by site; in groups of its own where its
    bit-width brings a size.

    **Raises** `UsageError` for an unknown layer or an impossible bit-width.
    """
    names = engine.network.names
    for name, width in bits.items():
        if name not in names:
            raise UsageError(f"the model has no layer {name!r}: {near(name, list(names))}")
        check_bits(int(width), f"bits of layer {name}")
    return {
        index: to_integers(engine.columns(index), *site_width(site, bits[site.layer], rounding))
        for index, site in enumerate(engine.network.sites)
        if site.layer in bits
    }


def round_weights(
    engine: Engine, bits: Mapping[str, int], rounding: Rounding | None = None
) -> dict[int, Edit]:
    """Edits with the values of `integer_weights`."""
    return with_weights(engine, integer_weights(engine, bits, rounding))


def with_weights(
    engine: Engine, integers: Mapping[int, Integers], edits: Edits | None = None
) -> dict[int, Edit]:
    """The edits, with the values of integers for weights."""
    found = dict(edits or {})
    for index, own in integers.items():
        site, shape = engine.network.sites[index], engine.weight(index).shape
        weight = site.from_columns(jnp.asarray(own.values()), shape)
        found[index] = found.get(index, Edit())._replace(weight=weight)
    return found


def with_grids(network: Network, edits: Edits, grids: ActivationGrids) -> dict[int, Edit]:
    """The edits, with inputs and operands of products of two activations rounded too."""
    indices = sorted({*edits, *grids.inputs})
    found = {i: edits.get(i, Edit())._replace(input_grid=grids.inputs.get(i)) for i in indices}
    return with_attention(network.attention, found, grids.attention)


def with_attention(
    products: Sequence[Product], edits: Edits, grids: Mapping[int, tuple[Grid, Grid]]
) -> dict[int, Edit]:
    """The edits, with operands of `products` rounded; `grids` by the product's index."""
    by_site: dict[int, list[tuple[Grid, Grid] | None]] = {}
    for index, product in enumerate(products):
        by_site.setdefault(product.site, []).append(grids.get(index))
    own = {site: tuple(pairs) for site, pairs in by_site.items() if any(pairs)}
    indices = sorted({*edits, *own})
    return {i: edits.get(i, Edit())._replace(attention=own.get(i, ())) for i in indices}


def attention_grids(products: Sequence[Product], edits: Edits) -> dict[int, tuple[Grid, Grid]]:
    """The inverse: the grids of the operands of `products` in edits, by the product's index."""
    found, place = {}, Counter[int]()
    for index, product in enumerate(products):
        own = edits.get(product.site, Edit()).attention
        pair = own[place[product.site]] if own else None
        place[product.site] += 1
        if pair is not None:
            found[index] = pair
    return found

"""`Engine`: run a network segment by segment, with weights replaced and tensors recorded.

Changing layer `l` leaves everything before it as it was: keep the state at the cut before
`l`, and run only what follows. Plain suffix runs, one state at a time, are the fastest way
on CPU; stacking several states is for accelerators, and for splitting them among devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxyq.devices import current
from proxyq.engine.memory import bytes_per_image, images_at_once
from proxyq.engine.placement import ALONE, Placement, can_split, placement
from proxyq.engine.segments import NO_EDIT, Edit, Segment, State, call, call_site, cut
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.graph import Var
from proxyq.model.layers import weight_columns
from proxyq.model.model import Model, logits_of
from proxyq.model.network import LAYERS_AT, Network, network

Edits = Mapping[int, Edit]
"""What is changed at which site, by the site's index."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine:
    """A network ready to run: parameters on the device, segments cut.

    `batch_size` images run at once; `chunks` cuts a larger set into batches of just that
    size, so that nothing is compiled twice. `placement` says how a batch is split among devices,
    `memory` how many bytes of a device images may take, `None` for no bound.
    """

    network: Network
    placement: Placement = ALONE
    memory: int | None = None

    @classmethod
    def build(
        cls,
        model: Model,
        images: int,
        *,
        batch_norm: str = "running",
        memory: int | None = None,
        batch_size: int | None = None,
        tape: bool = False,
    ) -> "Engine":
        """An engine for a set of `images`, as many at once as `memory` bytes a device allow.

        With `tape`, as many as can be kept whole for derivatives. It runs on the devices of the
        surrounding `on_devices`.
        """
        exactly, devices = batch_size is not None, current()
        apart = devices.count == 1 or can_split(network(model, LAYERS_AT).graph)
        where = placement(devices, batch_size or images, exactly=exactly, apart=apart)
        if batch_size is None:
            batch_size = images_at_once(model, images, memory, tape=tape, parts=where.images)
        engine = _engine(cls, model, batch_size, batch_norm, where, memory)
        if all(site.apart for site in engine.network.sites):
            return engine
        if batch_norm == "batch":
            name = next(site.layer for site in engine.network.sites if not site.apart)
            raise ProxyqError(
                f"the images of a batch cannot be told apart in layer {name!r}: use "
                "batch_norm='running'."
            )
        # Measured for each image, so one image at a time.
        return _engine(cls, model, 1, batch_norm, placement(devices, 1), memory)

    @property
    def batch_size(self) -> int:
        """Images in one run."""
        return self.network.graph.batch_size

    def with_at_most(self, images: int) -> "Engine":
        """This engine, or the same with batches of so many images where its own are larger."""
        if self.batch_size <= images:
            return self
        of = self.network
        return Engine.build(
            of.model, images, batch_norm=of.batch_norm, memory=self.memory, batch_size=images
        )

    @property
    def room(self) -> int | None:
        """Bytes that `memory` leaves beside one batch, for what is kept of the others."""
        if self.memory is None:
            return None
        batch = 2 * self.batch_size * bytes_per_image(self.network.graph)
        return max(0, self.placement.images * self.memory - batch)

    @cached_property
    def frontier(self) -> Mapping[Var, Any]:
        """Folded weights, biases and tables, on every device."""
        names = list(self.network.model.params)
        values = [self.placement.whole(self.network.model.params[name]) for name in names]
        graph = self.network.graph

        def prelude(values: list[Any]) -> list[Any]:
            env = graph.run_prelude(dict(zip(names, values, strict=True)))
            return [env[var] for var in graph.frontier]

        program = jax.jit(prelude, out_shardings=self.placement.everywhere)
        return dict(zip(graph.frontier, program(values), strict=True))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The head, then one segment for each site."""
        return cut(self.network)

    def weight(self, site: int) -> Any:
        """A site's weight in floating point, batch norm folded in."""
        return self.frontier[self.network.sites[site].weight]

    def columns(self, site: int) -> Any:
        """The same as `[fan_in, channels]`, in float32 at least."""
        where, weight = self.network.sites[site], self.weight(site)
        return at_least_float32(weight_columns(weight, where.channel_axes))

    def chunks(self, inputs: Any) -> Iterator[tuple[Any, int]]:
        """Batches of `batch_size`, the last one padded by repeating its last example.

        Yields the batch and how many of its examples are real. Nothing may depend on the
        padding, so batch statistics need a set that fits one batch.

        **Raises** `UsageError` for examples of another shape than the model's.
        """
        leaves, tree = jax.tree.flatten(inputs)
        self._check_shapes(leaves)
        total, size = len(leaves[0]), self.batch_size
        for start in range(0, total, size):
            count = min(size, total - start)
            rows = np.minimum(np.arange(start, start + size), total - 1)
            whole = count == size
            batch = [leaf[start : start + size] if whole else leaf[rows] for leaf in leaves]
            types = (var.aval.dtype for var in self.network.graph.inputs)
            place = self.placement.batch
            arrays = [place(leaf, kind) for leaf, kind in zip(batch, types, strict=True)]
            yield jax.tree.unflatten(tree, arrays), count

    def _check_shapes(self, leaves: list[Any]) -> None:
        wanted = [tuple(var.aval.shape[1:]) for var in self.network.graph.inputs]
        given = [tuple(np.shape(leaf)[1:]) for leaf in leaves]
        if given == wanted:
            return
        model, hint = self.network.model, ""
        if model.image_layout and len(given) == len(wanted) == 1 and len(given[0]) == 3:
            last = model.image_layout == "NHWC"
            first, *rest = given[0] if last else (given[0][2], *given[0][:2])
            if wanted[0] == ((*rest, first) if last else (first, *rest)):
                hint = f": the model reads images with the channels {'last' if last else 'first'}"
        raise UsageError(
            f"the inputs of {model.name!r} must have the shape {_shapes(wanted)} for each example, "
            f"got {_shapes(given)}{hint}."
        )

    def start(self, inputs: Any) -> State:
        """The state before the first site."""
        graph, leaves = self.network.graph, jax.tree.leaves(inputs)
        if self.placement.mesh is not None:
            leaves = [self.placement.batch(leaf) for leaf in leaves]
        state = dict(zip(graph.inputs, leaves, strict=True))
        return self._run(self.segments[0], state, NO_EDIT, ())[0]

    def step(
        self, state: State, site: int, edit: Edit = NO_EDIT, capture: tuple[Var, ...] = ()
    ) -> tuple[State, list[Any]]:
        """Run the segment that begins with `site`: the state after it, and what is captured."""
        return self._run(self.segments[site + 1], state, edit, capture)

    def site_output(self, state: State, site: int, edit: Edit = NO_EDIT) -> Any:
        """A site's own output under an edit, from the state before it."""
        weight = self.weight(site) if edit.weight is None else edit.weight
        where = self.network.sites[site]
        data = self.network.graph.main[where.position].invars[1 - where.operand]
        x = state[data] if data in state else self.frontier[data]
        return call_site(self.network, site, x, weight, edit)

    def outputs(self, state: State) -> Any:
        """The network's outputs, from the state after the last segment."""
        graph = self.network.graph
        known = {**self.frontier, **state}
        leaves = [getattr(a, "val", None) if a not in known else known[a] for a in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, leaves)

    def resume(self, state: State, site: int, edits: Edits) -> Any:
        """The outputs, from the state before `site`, with `edits` at it and after it."""
        for index in range(site, len(self.network.sites)):
            state, _ = self.step(state, index, edits.get(index, NO_EDIT))
        return self.outputs(state)

    def run(self, inputs: Any, edits: Edits | None = None) -> Any:
        """The outputs on one batch of `batch_size` inputs, with layers edited."""
        return self.resume(self.start(inputs), 0, edits or {})

    def logits(
        self, inputs: Any, edits: Edits | None = None, tick: Callable[[], None] | None = None
    ) -> np.ndarray:
        """The first output on a set of any size: `[images, …]`."""
        parts = []
        for batch, count in self.chunks(inputs):
            parts.append(np.asarray(at_least_float32(logits_of(self.run(batch, edits))))[:count])
            if tick is not None:
                tick()
        return np.concatenate(parts)

    def logits_each(
        self, state: State, site: int, alternatives: Sequence[Edits], *, stacked: bool = False
    ) -> Iterator[np.ndarray]:
        """The first output from the state before `site`, with each of several edits, in order.

        As many at once as there are devices for alternatives, with `stacked` all of them; but
        one after the other where they differ in what they change after the site.
        """
        size = len(alternatives) if stacked else self.placement.alternatives
        later = [{at: edit for at, edit in edits.items() if at > site} for edits in alternatives]
        alike = all(
            own.keys() == later[0].keys() and all(own[at] is later[0][at] for at in own)
            for own in later
        )
        if not alike or min(size, len(alternatives)) <= 1:
            for edits in alternatives:
                yield np.asarray(logits_of(self.resume(state, site, edits)))
            return
        for start in range(0, len(alternatives), size):
            some = [edits.get(site, NO_EDIT) for edits in alternatives[start : start + size]]
            # As many as there are shares: nothing is compiled again for the last ones.
            short = -len(some) % self.placement.alternatives
            outputs = self.resume_stacked(state, site, [*some, *some[-1:] * short], later[0])
            yield from np.asarray(logits_of(outputs))[: len(some)]

    def resume_stacked(
        self, state: State, site: int, alternatives: list[Edit], later: Edits | None = None
    ) -> Any:
        """`resume` for several edits of ONE site at once, stacked along a new first axis.

        `later` are edits of sites after it, the same for all. For accelerators: on CPU it gains
        nothing over one `resume` an edit, and sums run in another order, so results of the two
        ways should not be mixed.
        """
        later = later or {}
        after = [self.step(state, site, edit)[0] for edit in alternatives]
        stacked = {var for var in after[0] if any(s[var] is not after[0][var] for s in after)}
        current = {
            var: self.placement.stack([s[var] for s in after]) if var in stacked else after[0][var]
            for var in after[0]
        }
        for index in range(site + 1, len(self.network.sites)):
            segment, edit = self.segments[index + 1], later.get(index, NO_EDIT)
            flags = tuple(var in stacked for var in segment.reads)
            if not any(flags):
                current, _ = self._run(segment, current, edit, ())
                continue
            current, _ = self._run(segment, current, edit, (), flags)
            stacked |= set(segment.writes)
        # An output that the site does not reach is the same for every alternative.
        number = len(alternatives)
        spread = {
            var: value if var in stacked else jnp.broadcast_to(value, (number, *value.shape))
            for var, value in current.items()
        }
        return self.outputs(spread)

    def _run(
        self,
        segment: Segment,
        state: State,
        edit: Edit,
        capture: tuple[Var, ...],
        stacked: tuple[bool, ...] | None = None,
    ) -> tuple[State, list[Any]]:
        weight = None
        if segment.site is not None:
            weight = self.weight(segment.site) if edit.weight is None else edit.weight
        # What is not made here is known already: a segment's input or a kept tensor.
        made = {var for eqn in segment.eqns for var in eqn.outvars}
        ahead = tuple(var for var in capture if var in made)
        written, recorded = call(
            self.network,
            segment,
            edit,
            weight,
            [self.frontier[var] for var in segment.constants],
            [state[var] for var in segment.reads],
            ahead,
            stacked,
        )
        after = {var: state[var] for var in segment.keeps}
        after.update(zip(segment.writes, written, strict=True))
        known = dict(zip(ahead, recorded, strict=True))
        return after, [known[var] if var in known else state[var] for var in capture]


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "()"


def at_least_float32(array: Any) -> Any:
    """The same numbers, bfloat16 and float16 as float32: sums and grids are too fine for those."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


@lru_cache(maxsize=8)
def _engine(
    kind: type[Engine],
    model: Model,
    batch_size: int,
    batch_norm: str,
    where: Placement,
    memory: int | None,
) -> Engine:
    """Engines are kept, so that folding the same weights again compiles nothing."""
    of = network(model, batch_size, batch_norm=batch_norm)
    return kind(network=of, placement=where, memory=memory)

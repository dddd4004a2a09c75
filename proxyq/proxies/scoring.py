"""Several proxies at once: shared passes, kept results, and going on after a kill.

Proxies that record with the same options share one set of taps. What each of them answers is
kept in a cache, under a digest of everything that it depends on: weights, graph, images,
options, seed, code and versions.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from proxyq.checkpoint import Checkpoint
from proxyq.devices import several
from proxyq.engine import Engine, TapOptions, Taps, collect
from proxyq.engine.pairs import RowWork
from proxyq.errors import ProxyqError, UsageError
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.proxies.cache import Cache
from proxyq.proxies.proxy import Proxy, Scores
from proxyq.quantize import Rounding
from proxyq.widths import written

Request = tuple[Proxy, Mapping[str, Any]]
logger = logging.getLogger("proxyq.scores")


@dataclass(kw_only=True)
class Group:
    """Requests that share taps: the options that they agree on, and what they need together."""

    options: dict[str, Any] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)
    needs: dict[str, None] = field(default_factory=dict)


def grouped(requests: Sequence[Request]) -> list[Group]:
    """Requests by the tap options they need; each joins the first group that it agrees with."""
    groups: list[Group] = []
    for index, (proxy, options) in enumerate(requests):
        governing = proxy.tap_options(proxy.check_options(options))
        for group in groups:
            if all(group.options.get(k, v) == v for k, v in governing.items()):
                break
        else:
            group = Group()
            groups.append(group)
        group.options |= governing
        group.members.append(index)
        group.needs |= dict.fromkeys(proxy.needs)
    return groups


def score(
    model: Model,
    requests: Sequence[Request],
    inputs: Any = None,
    *,
    labels: Any = None,
    bits: Sequence[int] = (2, 3, 4, 8),
    activation_bits: Sequence[int] = (),
    seed: int = 0,
    memory: int | None = None,
    rounding: Rounding | None = None,
    cache: Cache | None = None,
    failed: Callable[[Proxy, ProxyqError], None] | None = None,
    pair_work: Callable[[TapOptions], RowWork] | None = None,
    progress: Progress = silent,
) -> list[Scores]:
    """The scores of several proxies, in the order of `requests` (proxy, options).

    **Arguments:**

    - `inputs`: images `[images, …]`, or `None` where weights are enough; `labels`: theirs.
    - `bits`, `activation_bits`: candidate bit-widths of weights and of what layers read.
    - `seed`: of whatever is random in proxies and targets.
    - `cache`: where finished scores are kept, and long computations go on after a kill.
    - `failed`: called with a proxy that cannot score this network, which is then left out of
      the answer; without it, its error is raised.
    - `pair_work`: who measures pairs of layers, by the options that they are measured with.

    What came from the cache is logged (`proxyq.scores`), and what took how long.

    **Raises** `ProxyqError` when a score would break a solver, naming layer and proxy.
    """
    _check_labels(labels, inputs)
    setting = _Setting(
        model=model,
        inputs=inputs,
        labels=labels,
        bits=tuple(bits),
        activation_bits=tuple(activation_bits),
        seed=seed,
        memory=memory,
        rounding=rounding or Rounding(),
        cache=cache or Cache(),
        failed=failed,
        pair_work=pair_work,
        progress=progress,
    )
    return setting.scores(_able(model, requests, setting.bits, failed))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Setting:
    """All arguments of `score` but the requests."""

    model: Model
    inputs: Any
    labels: Any
    bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    seed: int
    memory: int | None
    rounding: Rounding
    cache: Cache
    failed: Callable[[Proxy, ProxyqError], None] | None
    pair_work: Callable[[TapOptions], RowWork] | None
    progress: Progress

    def scores(self, requests: Sequence[Request]) -> list[Scores]:
        """See `score`."""
        facts = self.cache.facts(
            self.model,
            inputs=self.inputs,
            labels=self.labels,
            bits=written(self.bits),
            activation_bits=list(self.activation_bits),
            seed=self.seed,
            memory=self.memory,
            rounding=self.rounding,
        )
        answers: dict[int, Scores] = {}
        for group in grouped(requests):
            answers |= self._of_group(group, requests, facts)
        return [answers[index] for index in sorted(answers)]

    def _of_group(
        self, group: Group, requests: Sequence[Request], facts: Mapping[str, Any]
    ) -> dict[int, Scores]:
        """Scores of the group's members, by their places among the requests."""
        # What is recorded together is compiled together, which decides the last digits: an
        # answer from the cache must not depend on what else was asked for back then.
        recorded = {**facts, "tap_options": group.options, "needs": list(group.needs)}
        keys = {index: self.cache.key(recorded, *requests[index]) for index in group.members}
        known = {index: self.cache.load(key, self.model) for index, key in keys.items()}
        answers = {index: found for index, found in known.items() if found is not None}
        missing = [index for index in keys if index not in answers]
        if answers:
            names = (requests[index][0].name for index in answers)
            logger.info("from the cache: %s", ", ".join(names))
        if not missing:
            return answers
        # All that the group needs, also for those that are done: a run that goes on after a
        # kill compiles the same programs, so its last digits are the same.
        shared = self.cache.checkpoint(self.cache.group_key(recorded))
        started = time.perf_counter()
        try:
            taps = self._taps(group, shared)
        except ProxyqError as error:
            if self.failed is None:
                raise
            if len(group.members) == 1:
                self.failed(requests[group.members[0]][0], error)
                return answers
            for index in missing:  # each alone: what one needs must not stop the others
                for alone in self.scores([requests[index]]):
                    answers[index] = alone
            return answers
        seconds = time.perf_counter() - started
        if len(missing) > 1:
            names = ", ".join(requests[index][0].name for index in missing)
            logger.debug("%.2f s: passes for %s", seconds, names)
            seconds = 0.0
        for index in missing:
            found = self._of_proxy(*requests[index], taps, keys[index], seconds)
            if found is not None:
                answers[index] = found
        shared.clear()
        return answers

    def _taps(self, group: Group, checkpoint: Checkpoint) -> Taps:
        options = TapOptions(**group.options)
        number = LAYERS_AT if self.inputs is None else len(jax.tree.leaves(self.inputs)[0])
        engine = Engine.build(
            self.model,
            number,
            batch_norm=options.batch_norm,
            memory=self.memory,
            batch_size=number if options.batch_norm == "batch" else None,
        )
        return collect(
            engine,
            self.inputs,
            tuple(group.needs),
            self.bits,
            labels=self.labels,
            activation_bits=self.activation_bits,
            options=options,
            rounding=self.rounding,
            seed=self.seed,
            memory=self.memory,
            checkpoint=checkpoint,
            pair_work=None if self.pair_work is None else self.pair_work(options),
            progress=self.progress,
        )

    def _of_proxy(
        self, proxy: Proxy, options: Mapping[str, Any], taps: Taps, key: str, seconds: float
    ) -> Scores | None:
        """A proxy's scores, kept under `key`; `seconds` are those of passes that it alone took."""
        kept = self.cache.checkpoint(key)
        try:
            found = proxy.on(taps, key=jax.random.key(self.seed), checkpoint=kept, **options)
        except ProxyqError as error:
            if self.failed is None:
                raise
            self.failed(proxy, error)
            return None
        if (devices := several()) is not None:
            found = replace(found, notes={**found.notes, "devices": devices})
        if (spent := seconds + found.seconds) >= 0.005:
            logger.debug("%.2f s: %s", spent, proxy.name)
        self.cache.save(key, found)
        kept.clear()
        return found


def _able(
    model: Model,
    requests: Sequence[Request],
    bits: Sequence[int],
    failed: Callable[[Proxy, ProxyqError], None] | None,
) -> list[Request]:
    """The requests whose proxies can score such layers, and such bit-widths, at all."""
    layers, able = network(model, LAYERS_AT).layers, []
    for proxy, options in requests:
        try:
            proxy.check_layers(layers)
            proxy.check_groups(bits)
        except ProxyqError as error:
            if failed is None:
                raise
            failed(proxy, error)
            continue
        able.append((proxy, options))
    return able


def _check_labels(labels: Any, inputs: Any) -> None:
    if labels is None or inputs is None:
        return
    given, images = np.asarray(labels), len(jax.tree.leaves(inputs)[0])
    if given.dtype.kind not in "iu" or given.ndim < 1 or len(given) != images:
        raise UsageError(
            f"`labels` must be whole numbers, for each of the {images} images, got "
            f"{given.dtype.name} of shape {list(given.shape)}."
        )

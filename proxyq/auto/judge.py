"""`Judge`: what a plan really does, on images that no plan was made from.

Predicted costs of different proxies are no common currency, and the best of ten predictions is
flattered. So every plan that is a candidate is run, quantized and corrected as it will be used,
and its outputs are compared with the float network's on held-back images, by a `Loss` that ranks
plans as their test accuracy does.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from proxyq.engine import Edits, Engine
from proxyq.engine.loss import BROKEN, Loss, loss_of
from proxyq.engine.memory import less, outputs_per_image
from proxyq.engine.statistics import Moments, fitted_bytes
from proxyq.errors import ProxyqError
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.ptq.correct import held_back
from proxyq.ptq.plan_edits import Choice, PlanEdits
from proxyq.quantize import Rounding

LOOKED_AT = 4
"""Images that `measure` looks at, at most, as a multiple of those that are fitted on."""


class Verdict(NamedTuple):
    """A plan's loss on the images that its correction is `fitted` on, and on those `held_back`."""

    fitted: Loss
    held_back: Loss


class Judge:
    """Runs plans on `fit` images (their correction) and `check` images (their measure).

    Of many `check` images the first, `LOOKED_AT` times those to fit, measure each plan. The rest
    are for the last few: the best of a hundred plans is flattered by the images it was found on.

    - `correction`: `none`, `weights` or `statistics`; may be changed between plans.
    - `attention_bits`: of all products of two activations, in every plan.
    - `passes`: forward passes of all `fit` images spent so far, about; `seconds` that those of
      plans took.
    - `kept`: what was measured once and serves plans for any budget.
    """

    def __init__(
        self,
        model: Model,
        fit: Any,
        check: Any,
        *,
        rounding: Rounding | None = None,
        correction: str = "none",
        attention_bits: int | None = None,
        memory: int | None = None,
    ):
        self.fit, self.check, self.memory = fit, check, memory
        fitted, held = (len(jax.tree.leaves(images)[0]) for images in (fit, check))
        looked_at = min(held, LOOKED_AT * fitted)
        self._looked_at = jax.tree.map(lambda x: x[:looked_at], check)
        self.reserve = jax.tree.map(lambda x: x[looked_at:], check) if looked_at < held else None
        self.rounding, self.correction = rounding or Rounding(), correction
        # Held beside the batches: moments and outputs of `fit`, and the outputs of `check`.
        least = fitted_bytes(model, fitted)
        least += 8 * held * outputs_per_image(network(model, LAYERS_AT).graph)
        what = f"comparing plans on {fitted} images and {held} held back"
        self.engine = Engine.build(model, fitted, memory=less(memory, least, what))
        self.passes, self.seconds = 0.0, 0.0
        self._plan_edits = PlanEdits(self.engine, fit, self.rounding, attention_bits)
        self.kept: dict[Any, Any] = {}
        self._fitted: dict[tuple[Any, ...], Loss] = {}
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self._last: tuple[tuple[Any, ...], Edits] | None = None
        self._ratio = looked_at / fitted
        self._reserve_ratio = (held - looked_at) / fitted

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in order."""
        return self.engine.network.names

    @cached_property
    def _float(self) -> tuple[list[Moments], np.ndarray]:
        self.passes += 1
        return self._plan_edits.float_run

    @property
    def moments(self) -> list[Moments]:
        """The float network's statistics on the `fit` images."""
        return self._float[0]

    @cached_property
    def _reference(self) -> np.ndarray:
        self.passes += self._ratio
        return self.engine.logits(self._looked_at)

    @cached_property
    def _reserve_reference(self) -> np.ndarray:
        self.passes += self._reserve_ratio
        return self.engine.logits(self.reserve)

    @property
    def trial_passes(self) -> float:
        """Forward passes of all `fit` images that `fitted` takes, about."""
        return 1 + (2 if self.correction == "statistics" else 0)

    @property
    def plan_passes(self) -> float:
        """The same of `measure`."""
        return self.trial_passes + self._ratio

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def seconds_per_pass(self) -> float:
        """What a forward pass of all `fit` images takes, now that it is compiled."""
        started = time.perf_counter()
        self._loss(self._float[1], self.fit, {} if self._last is None else self._last[1])
        return time.perf_counter() - started

    def edits(self, plan: Sequence[Choice]) -> Edits:
        """The network of a plan, rounded and corrected."""
        self.passes += 2 * (self.correction == "statistics")
        return self._plan_edits(plan, self.correction)

    def fitted(self, plan: Sequence[Choice]) -> Loss:
        """A plan's loss on the images that its correction is fitted on, which is the cheaper."""
        key = (self.correction, *plan)
        if key not in self._fitted:
            reference = self._float[1]
            with self._timed():
                self.passes += 1
                self._fitted[key] = self._loss(reference, self.fit, self._edits_of(key, plan))
        return self._fitted[key]

    def measure(self, plan: Sequence[Choice]) -> Verdict:
        """How far a plan's network is from the float one; a plan is run once."""
        key = (self.correction, *plan)
        if key not in self._verdicts:
            fitted = self.fitted(plan)
            reference = self._reference
            with self._timed():
                self.passes += self._ratio
                edits = self._edits_of(key, plan)
                held_back = self._loss(reference, self._looked_at, edits)
            self._verdicts[key] = Verdict(fitted, held_back)
        return self._verdicts[key]

    def verify(self, plan: Sequence[Choice]) -> Loss:
        """A plan's loss on all images held back, those in reserve too."""
        measured = self.measure(plan).held_back
        if self.reserve is None:
            return measured
        self.passes += self._reserve_ratio
        edits = self._edits_of((self.correction, *plan), plan)
        rest = self._loss(self._reserve_reference, self.reserve, edits)
        share = self._ratio / (self._ratio + self._reserve_ratio)
        return Loss(*(share * a + (1 - share) * b for a, b in zip(measured, rest, strict=True)))

    def _edits_of(self, key: tuple[Any, ...], plan: Sequence[Choice]) -> Edits:
        """The edits of the plan that was asked for last are kept."""
        if self._last is None or self._last[0] != key:
            self._last = key, self.edits(plan)
        return self._last[1]

    def best_correction(self, plan: Sequence[Choice], among: Sequence[str]) -> dict[str, Loss]:
        """Held-back loss of a plan under each correction; the best is set from now on.

        **Raises** `ProxyqError` when no correction gives finite outputs.
        """
        found = {}
        for name in among:
            self.correction = name
            found[name] = self.measure(plan).held_back
        self.correction = min(found, key=found.__getitem__)
        if found[self.correction] == BROKEN:
            raise ProxyqError(
                "the quantized network's outputs are not finite, so plans cannot be compared: "
                "check the model's weights and the data."
            )
        return found

    def _loss(self, reference: np.ndarray, images: Any, edits: Edits) -> Loss:
        return loss_of(reference, self.engine.logits(images, edits))


def halves(images: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of images to fit on, `most` of them, and of those to hold back.

    The images after the first `most` are held back; where there are too few, a quarter of all.
    """
    rows = np.arange(images)
    if images >= most + max(8, most // 4):
        return rows[:most], rows[most:]
    held = held_back(images)
    return rows[~held], rows[held]

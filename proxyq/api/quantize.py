"""`quantize_model`: a plan applied to a model."""

from dataclasses import fields
from typing import Any

import jax

from proxyq.engine import Engine
from proxyq.engine.ranges import input_grids
from proxyq.errors import ProxyqError, UsageError, near
from proxyq.model.model import Model
from proxyq.model.network import LAYERS_AT, network
from proxyq.progress import Progress, silent
from proxyq.ptq.correct import correct
from proxyq.ptq.quantized import QuantizedModel, round_weights, with_input_grids
from proxyq.quantize import Rounding
from proxyq.search.allocate.plan import Plan


def quantize_model(
    model: Model,
    plan: Plan,
    inputs: Any = None,
    *,
    correction: str | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """The model with a plan applied: weights rounded, statistics corrected, inputs rounded.

    `inputs` are prepared calibration images `[images, …]`; `correction` is the plan's own
    unless given. **Raises** `ProxyqError` when the plan is for another model.
    """
    widths = {name: b for name, b in plan.bits().items() if b is not None}
    activations = {
        name: layer.activation_bits
        for name, layer in plan.layers.items()
        if layer.activation_bits is not None
    }
    check_plan_fits(model, plan)
    images = LAYERS_AT if inputs is None else len(jax.tree.leaves(inputs)[0])
    engine = Engine.build(model, images, memory=memory)
    edits = round_weights(engine, widths, rounding_of(plan))
    if activations:
        if inputs is None:
            raise UsageError("activation ranges need calibration images: give `data` (--data).")
        edits = with_input_grids(edits, input_grids(engine, activations, inputs))
    wanted = correction or str(plan.method.get("correction", "none"))
    edits, used, notes = correct(engine, edits, inputs, wanted, progress=progress)  # type: ignore[arg-type]
    return QuantizedModel(model=model, bits=widths, edits=edits, correction=used, notes=notes)


def rounding_of(plan: Plan) -> Rounding:
    """The rounding that the plan was searched for."""
    record = plan.method.get("rounding") or {}
    known = {field.name for field in fields(Rounding)}
    if not isinstance(record, dict) or set(record) - known:
        raise ProxyqError(
            f"the plan's field 'method.rounding' may hold {', '.join(sorted(known))}, got "
            f"{record!r}."
        )
    try:
        return Rounding(**record)
    except UsageError as error:
        raise ProxyqError(f"the plan has a bad field 'method.rounding': {error}") from None


def check_plan_fits(model: Model, plan: Plan) -> None:
    """Refuse a plan whose layers are not the model's."""
    found = {layer.name: layer for layer in network(model, LAYERS_AT).layers}
    for name, layer in plan.layers.items():
        if name not in found:
            raise ProxyqError(
                f"the plan is for another model: it names the layer {name!r}, which "
                f"{model.name!r} does not have; {near(name, list(found))}"
            )
        if found[name].weights != layer.weights:
            raise ProxyqError(
                f"the plan is for another model: its layer {name!r} has {layer.weights:,} "
                f"weights, and that of {model.name!r} has {found[name].weights:,}."
            )
    missing = [name for name in found if name not in plan.layers]
    if missing:
        raise ProxyqError(
            f"the plan is for another model: it says nothing of the layer {missing[0]!r} of "
            f"{model.name!r}."
        )

"""`export_model`: a plan applied to a model, and the result in a file of another program."""

import os
from typing import Any

from proxyq.api.inputs import as_data, as_model, inputs_of
from proxyq.api.method import DEFAULT_SAMPLES
from proxyq.api.quantize import fitting_model, quantize_model
from proxyq.engine.ranges import ActivationRange
from proxyq.errors import UsageError
from proxyq.export.exported import Exported
from proxyq.export.registry import EXPORTERS
from proxyq.progress import Progress, silent
from proxyq.proxies import Cache
from proxyq.ptq.packed import load_packed
from proxyq.ptq.reconstruct import Learning
from proxyq.search.allocate.plan import Plan


def export_model(
    model: Any = None,
    plan: Plan | None = None,
    data: Any = None,
    *,
    to: str,
    out: str | os.PathLike[str],
    packed: str | os.PathLike[str] | None = None,
    strict: bool = False,
    correction: str | None = None,
    reconstruction: str = "none",
    learning: Learning | None = None,
    activation_range: ActivationRange = "mse",
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    memory: int | None = None,
    cache_dir: str | os.PathLike[str] | Cache | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a quantized network in the format of another program.

    **Arguments:**

    - `to`: the format, a name in `proxyq.export.registry.EXPORTERS`; `out`: where to write.
    - `packed`: a file of `pack` to export, instead of quantizing now; budgets are those of its own
      plan unless another is given.
    - `strict`: whether it is an error when the format stores a layer with more bits than asked for.

    `data` are unlabelled calibration images, on which the file is tried too; all else as for
    `pack`.

    **Returns** what was written, which layers take more bits than asked for, and by how much the
    outputs differ from the quantized network's.

    **Raises** `UsageError` for an unknown format (with near misses), and where neither plan nor
    packed network is given; `MissingExtra` without the format's packages; otherwise as
    `quantize_model` and the exporter.
    """
    exporter = EXPORTERS.get(to).load()
    if plan is None and packed is None:
        raise UsageError("name what to export: a `plan`, or a `packed` network (--packed).")
    model = as_model(model)
    if plan is not None:
        model = fitting_model(model, plan)
    calibration = as_data(data, model)
    inputs = None if calibration is None else inputs_of(calibration, model, samples, None)
    if packed is not None:
        asked = {
            "`correction` (--correction)": correction,
            "`reconstruction` (--reconstruct)": None
            if reconstruction == "none"
            else reconstruction,
            "`learning` (--steps)": learning,
        }
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise UsageError(
                f"a packed network is quantized already: leave out {given[0]}, or `packed` "
                "(--packed)."
            )
        made = load_packed(packed, model)
    else:
        assert plan is not None
        made = quantize_model(
            model,
            plan,
            inputs,
            correction=correction,
            reconstruction=reconstruction,
            learning=learning,
            activation_range=activation_range,
            seed=seed,
            memory=memory,
            cache=Cache.of(cache_dir),
            progress=progress,
        )
    return exporter(made, out, plan=plan or made.plan, strict=strict, inputs=inputs)

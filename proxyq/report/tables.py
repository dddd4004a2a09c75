"""Tables for the terminal: rich renderables of at most 88 columns, and lines of text.

Nothing here prints. Give the tables to a `rich.console.Console`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from proxyq.search.allocate.plan import FLOAT_BITS, Plan, PlannedBudget, PlannedLayer
from proxyq.search.allocate.text import elided, wrapped

if TYPE_CHECKING:
    from proxyq.model.network import Network
    from proxyq.proxies import Proxy
    from proxyq.search.recipes import Recipe

WIDTH = 88
BAR = 8
"""Characters of the bar of bits: one for each bit up to 8."""


def _table(**options: Any) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        footer_style="bold",
        **options,
    )


def _names(table: Table, names: Iterable[str], head: str, taken: int) -> list[str]:
    """Add the column of names, their middles left out where `taken` leaves too little."""
    names = list(names)
    width = max(12, min(WIDTH - taken, max(map(len, [head, *names]))))
    table.add_column(head, no_wrap=True, width=width)
    return [elided(name, width) for name in names]


# -- plans -----------------------------------------------------------------------------


def plan_table(plan: Plan, kinds: Mapping[str, str] | None = None) -> Table:
    """A line for each layer, in network order: kind, bits, weights, size, score.

    `kinds` are the kinds of the layers by name, which a plan file does not hold.
    """
    kinds = kinds or {}
    scores, head = layer_scores(plan)
    activations = any(layer.activation_bits is not None for layer in plan.layers.values())
    pinned = any(layer.pinned for layer in plan.layers.values())
    kind_width = max((len(kinds.get(name, "")) for name in plan.layers), default=0)
    taken = 57 + (kind_width + 2 if kinds else 0) + (6 if activations else 0)
    table = _table(show_footer=True)
    names = _names(table, plan.layers, "layer", taken)
    table.columns[0].footer = f"{len(plan.layers)} layers"
    if kinds:
        table.add_column("kind", no_wrap=True)
    total = sum(layer.weights for layer in plan.layers.values())
    table.add_column("bits", no_wrap=True, footer=f"{plan.average_bits:.4g}")
    if activations:
        table.add_column("act.", justify="right", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True, footer=f"{total:,}")
    size = f"{plan.size_bits / 8192:,.1f}"
    table.add_column("KiB", justify="right", no_wrap=True, footer=size)
    if scores:
        table.add_column(head, justify="right", no_wrap=True)
    for shown, (name, layer) in zip(names, plan.layers.items(), strict=True):
        row: list[Any] = [shown]
        if kinds:
            row.append(kinds.get(name, ""))
        row.append(_bits(layer))
        if activations:
            row.append(_width(layer.activation_bits))
        row += [f"{layer.weights:,}", f"{_size(layer) / 8192:,.1f}"]
        if scores:
            row.append(f"{scores[name]:.3g}" if name in scores else "")
        table.add_row(*row)
    if pinned:
        table.caption = "* pinned"
        table.caption_justify = "left"
    return table


def layer_scores(plan: Plan) -> tuple[dict[str, float], str]:
    """The proxy's number for each layer, and what it is.

    Of a cost for each bit-width that of the bits chosen, else the importance; none when the
    plan holds no scores.
    """
    found = (plan.predicted or {}).get("scores") or {}
    axis = list(plan.method.get("bits") or ())
    numbers: dict[str, float] = {}
    head = "score"
    for name, layer in plan.layers.items():
        value = found.get(name)
        if isinstance(value, list):
            head = "cost"
            if len(value) == len(axis) and layer.weight_bits in axis:
                numbers[name] = float(value[axis.index(layer.weight_bits)])
        elif value is not None:
            numbers[name] = float(value)
    return numbers, head


def _size(layer: PlannedLayer) -> int:
    return layer.weights * (FLOAT_BITS if layer.weight_bits is None else layer.weight_bits)


def _width(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _bits(layer: PlannedLayer) -> Text:
    """`4 ████`: the number, and a bar of as many blocks."""
    if layer.weight_bits is None:
        return Text("float")
    star = "*" if layer.pinned else " "
    text = Text(f"{layer.weight_bits:>2}{star}")
    text.append("█" * min(layer.weight_bits, BAR), style=_COLOURS[min(layer.weight_bits, BAR)])
    return text


_COLOURS = {
    **dict.fromkeys((1, 2), "blue"),
    **dict.fromkeys((3, 4), "cyan"),
    **dict.fromkeys((5, 6), "green"),
    **dict.fromkeys((7, 8), "yellow"),
}


def plan_summary(plan: Plan) -> str:
    """What was searched, how good the answer is, what each budget asked and what it counts."""
    how = plan.method.get("recipe") or plan.method.get("proxy")
    parts = [str(plan.model.get("name", "plan"))]
    parts += [str(how)] if how else []
    parts += [f"{len(plan.layers)} layers", f"{plan.average_bits:.4g} bits on average"]
    lines = wrapped(parts)
    solver = plan.solver
    if solver is not None:
        proven = {"optimal": "optimal, proven", "feasible": "feasible, not proven best"}
        parts = [proven[solver.status], f"solver {solver.name}", f"cost {solver.objective:.4g}"]
        parts += [] if solver.bound is None else [f"bound {solver.bound:.4g}"]
        parts += [] if solver.gap is None else [f"gap {100 * solver.gap:.3g} %"]
        parts += [] if solver.seconds is None else [f"{solver.seconds:.2f} s"]
        lines += wrapped(parts)
    for budget in plan.budgets:
        lines += _budget_lines(budget, plan)
    lines += [f"note: {note}" for note in (solver.notes if solver else ())]
    return "\n".join(lines)


def _budget_lines(budget: PlannedBudget, plan: Plan) -> list[str]:
    unit = budget.unit if budget.unit in ("", *"kMGT") else f" {budget.unit}"
    share = f" ({100 * budget.achieved / budget.asked:.1f} %)" if budget.asked else ""
    first = f"{budget.name}: {budget.achieved:.5g} of {budget.asked:.5g}{unit}{share}"
    return [first, f"  counts {counted(budget, plan)}"]


def counted(budget: PlannedBudget, plan: Plan) -> str:
    """What goes into a budget, in words."""
    layers = len(plan.layers)
    pinned = sum(layer.pinned for layer in plan.layers.values())
    if budget.name == "size" and budget.unit == "bit":
        out = f", nor {pinned} pinned layer{'s' * (pinned > 1)}" if pinned else ""
        return f"the weights of {layers - pinned} searched layers; no scales and biases{out}"
    everything = f"all {layers} layers" + (f", {pinned} pinned among them" if pinned else "")
    if budget.name == "size":
        return f"the weights of {everything}; no scales and biases"
    if budget.name == "bops":
        return f"MACs × weight bits × activation bits of {everything}, for one image"
    if budget.name == "macs-bits":
        return f"MACs × weight bits of {everything}, for one image"
    return f"{everything}"


# -- accuracy --------------------------------------------------------------------------


def accuracy_table(measured: Mapping[str, Any], names: Sequence[str] | None = None) -> Table:
    """Float, uniform and plans, one below the other; `measured` is what `evaluate` reports.

    `names` stand for the plans, `plan` when there is one.
    """
    plans = measured.get("plans") or []
    if names is None:
        names = ["plan"] if len(plans) == 1 else [str(plan.get("file")) for plan in plans]
    uniform = measured.get("uniform")
    rows = [("float", {"top1": measured["float"]["top1"], "average_bits": FLOAT_BITS})]
    if uniform:
        rows.append((f"uniform {uniform['bits']} bit", uniform))
    rows += list(zip(names, plans, strict=True))
    table = _table()
    shown = _names(table, [name for name, _ in rows], "network", 56)
    for head in ("top-1 %", "bits", "KiB", "KL, nats"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("correction", no_wrap=True)
    for name, (_, row) in zip(shown, rows, strict=True):
        kl = row.get("kl")
        table.add_row(
            name,
            f"{row['top1']:.2f}",
            f"{row['average_bits']:.4g}",
            f"{row['size_bits'] / 8192:,.1f}" if "size_bits" in row else "",
            "" if kl is None else f"{kl:.4g}",
            row.get("correction", ""),
        )
    table.caption = f"on {measured['float']['n']:,} images"
    table.caption_justify = "left"
    return table


# -- models and shelves ----------------------------------------------------------------


def network_table(network: "Network") -> Table:
    """A line for each layer: kind, weights, MACs, output shape, group; totals below."""
    layers = network.layers
    kind_width = max(len(layer.kind) for layer in layers)
    groups = {layer.group for layer in layers if layer.group is not None}
    group_width = min(22, max(map(len, [*groups, "group"])))
    weights = sum(layer.weights for layer in layers)
    macs = sum(layer.macs for layer in layers)
    shapes = ["×".join(map(str, layer.output_shape)) for layer in layers]
    taken = kind_width + group_width + max(map(len, [*shapes, "output"])) + 31
    table = _table(show_footer=True)
    names = _names(table, (layer.name for layer in layers), "layer", taken)
    table.columns[0].footer = f"{len(layers)} layers"
    table.add_column("kind", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True, footer=f"{weights:,}")
    table.add_column("MACs", justify="right", no_wrap=True, footer=_count(macs))
    table.add_column("output", justify="right", no_wrap=True)
    table.add_column("group", no_wrap=True)
    for name, layer, shape in zip(names, layers, shapes, strict=True):
        table.add_row(
            name,
            layer.kind,
            f"{layer.weights:,}",
            _count(layer.macs),
            shape,
            elided(layer.group or "", group_width),
        )
    return table


def _count(number: int) -> str:
    """`1.81 G`, `231 k`."""
    for power, sign in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= power:
            return f"{number / power:.3g} {sign}"
    return str(number)


def proxies_table(proxies: Iterable["Proxy"]) -> Table:
    """A line or two for each proxy: shape, passes, needs, what it measures."""
    table = _table()
    table.add_column("proxy", no_wrap=True)
    table.add_column("gives", no_wrap=True)
    table.add_column("passes")
    table.add_column("needs")
    table.add_column("what it measures", ratio=1)
    for proxy in proxies:
        gives = "a number" if proxy.shape == "layers" else "a cost per bit"
        table.add_row(proxy.name, gives, proxy.passes, ", ".join(proxy.needs), proxy.summary)
    return table


def recipes_table(recipes: Iterable["Recipe"]) -> Table:
    """A line or two for each recipe: title and reference."""
    table = _table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("proxy", no_wrap=True)
    table.add_column("bits", no_wrap=True)
    table.add_column("method", ratio=1)
    for recipe in recipes:
        bits = ",".join(map(str, recipe.bits))
        table.add_row(recipe.name, recipe.proxy, bits, recipe.title or recipe.reference)
    return table

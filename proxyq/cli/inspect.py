"""`proxyq inspect`: what a model is made of."""

from typing import Any

from proxyq.cli import options as o
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_json
from proxyq.cli.runtime import working
from proxyq.errors import MissingOperators


def inspect(
    model: o.ModelName = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    embeddings: o.Embeddings = False,
    explain: o.Explain = False,
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
) -> None:
    """List a model's layers: kinds, weights, MACs, output shapes, groups."""
    try:
        with working(
            device=device, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet, computes=False
        ):
            from proxyq import api

            loaded = load(model, weights=weights, input_shape=input_shape, embeddings=embeddings)
            network = api.inspect(loaded)
    except MissingOperators as error:
        if explain:
            _print_missing(error.operators, as_json=json)
        raise

    if json:
        print_json({**network_json(network), **(explanation_json(network) if explain else {})})
        return
    from proxyq.report.tables import kept_table, network_table

    print_blocks(network_table(network), *([kept_table(network)] if explain else []))


def _print_missing(operators: dict[str, tuple[int, str]], *, as_json: bool) -> None:
    if as_json:
        told = {name: {"uses": uses, "in": path} for name, (uses, path) in operators.items()}
        print_json({"missing_operators": told})
        return
    from proxyq.report.tables import operators_table

    print_blocks(operators_table(operators))


def explanation_json(network: Any) -> dict[str, Any]:
    """What `inspect --explain --json` adds."""
    from proxyq.model.explain import kept_float

    kept = kept_float(network)
    return {
        "missing_operators": {},
        "float": {one.parameter: {"weights": one.weights, "why": one.why} for one in kept},
        "attention": {product.name: product.macs for product in network.attention},
    }


def network_json(network: Any) -> dict[str, Any]:
    """The object that `inspect --json` prints."""
    from proxyq.model.live import float_peak
    from proxyq.model.schedule import schedule
    from proxyq.search.allocate.together import fused

    peak = float_peak(schedule(network))
    siblings = {name: names for names in fused(network.layers) for name in names}
    return {
        "layers": {
            layer.name: {
                "kind": layer.kind,
                "weights": layer.weights,
                "macs": layer.macs,
                "output_shape": list(layer.output_shape),
                "group": layer.group,
                "shares_input": layer.shares_input,
                "fused": siblings[layer.name][0] if layer.name in siblings else None,
            }
            for layer in network.layers
        },
        "activation_memory": {"float_bytes": -(-peak.float_bits // 8), "layer": peak.layer},
    }

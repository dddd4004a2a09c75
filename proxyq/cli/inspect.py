"""`proxyq inspect`: what a model is made of."""

from typing import Any

from proxyq.cli import options as o
from proxyq.cli.models import load
from proxyq.cli.output import print_blocks, print_json
from proxyq.cli.runtime import working


def inspect(
    model: o.ModelName = None,
    weights: o.Weights = None,
    input_shape: o.InputShape = None,
    seed: o.UnusedNumber = None,
    json: o.AsJson = False,
    quiet: o.Quiet = False,
    cache_dir: o.CacheDir = None,
    no_cache: o.NoCache = False,
    device: o.Device = None,
) -> None:
    """List a model's layers: kinds, weights, MACs, output shapes, groups."""
    with working(
        device=device, cache_dir=cache_dir, no_cache=no_cache, quiet=quiet, computes=False
    ):
        from proxyq import api

        network = api.inspect(load(model, weights=weights, input_shape=input_shape))

    if json:
        print_json(network_json(network))
        return
    from proxyq.report.tables import network_table

    print_blocks(network_table(network))


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

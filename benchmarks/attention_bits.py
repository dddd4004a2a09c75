"""Embeddings of a sentence encoder whose products of two activations are rounded.

The network and sentences of `sentence_embeddings.py`. Prints, for bits of weights, of what layers
read and of both operands of attention's products, the cosine of each sentence's embedding with the
float one's: mean and fifth percentile.

    python benchmarks/attention_bits.py --encoder all-MiniLM-L6-v2/
"""

import argparse

import numpy as np
from sentence_embeddings import encoder_and_sentences, unit

import proxyq
from proxyq.api.quantize import quantize_model
from proxyq.model.network import LAYERS_AT, network
from proxyq.search.allocate.plan import Plan, PlannedLayer, PlannedProduct

WIDTHS = [
    *((None, None, bits) for bits in (8, 6, 5, 4, 3)),
    *((8, 8, bits) for bits in (None, 8, 6, 4)),
    *((4, 8, bits) for bits in (None, 8)),
]
"""Bits of weights, of inputs of layers and of products; `None` is float."""


def plan_of(model, weights, inputs, products):
    """The plan with these bits everywhere."""
    found = network(model, LAYERS_AT)
    layers = {
        layer.name: PlannedLayer(
            weight_bits=weights, activation_bits=inputs, weights=layer.weights, macs=layer.macs
        )
        for layer in found.layers
    }
    attention = {p.name: PlannedProduct(bits=products, macs=p.macs) for p in found.attention}
    return Plan(layers=layers, attention=attention, model=model.record())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", required=True, help="folder of the network")
    parser.add_argument("--range", default="mse", help="how ranges are taken (%(default)s)")
    args = parser.parse_args()
    model, calibration, held = encoder_and_sentences(args.encoder)
    found = network(model, LAYERS_AT)
    macs = [sum(one.macs for one in part) for part in (found.attention, found.layers)]
    print(f"{len(found.attention)} products, {100 * macs[0] / sum(macs):.1f} % of the MACs")
    whole = unit(proxyq.Engine.build(model, 500).logits(held, {}))
    print("weights  inputs  products  cosine  5 %")
    for widths in WIDTHS:
        plan = plan_of(model, *widths)
        made = quantize_model(
            model, plan, calibration, correction="none", activation_range=args.range
        )
        cosine = np.sum(unit(made.logits(held)) * whole, axis=1)
        shown = "  ".join(f"{'float' if b is None else b:>6}" for b in widths)
        low = np.percentile(cosine, 5)
        print(f"{shown}    {cosine.mean():.4f}  {low:.4f}", flush=True)


if __name__ == "__main__":
    main()

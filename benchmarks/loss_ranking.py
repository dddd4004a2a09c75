"""Which loss on unlabelled images ranks a network's plans as their test accuracy does?

    python benchmarks/methods.py plans    --network resnet20 --weights W --data D --into DIR
    python benchmarks/methods.py accuracy --network resnet20 --weights W --data D --into DIR
    python benchmarks/loss_ranking.py     --network resnet20 --weights W --data D --into DIR

Every plan whose accuracy `methods.py` measured is run on 1,024 training images, as rounding leaves
it and with statistics restored; then Spearman's rank correlation of each loss with the accuracy,
over all plans and over those of the same kind (wrecked, damaged, nearly whole):

- `kl`: mean KL from the float network, as it is;
- `one scale`: the same, with the logits of all images times the one number that makes it least;
- `rescaled`: the same, with a number for each image, by which `auto` orders wrecked plans;
- `agreement`: the share of images with the float network's answer.
"""

import argparse
import json

import numpy as np
from proxy_table import CORRECTIONS, calibration, folder, load

BANDS = ((0, 101), (0, 60), (60, 85), (85, 101))
AT_LEAST = 8


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet20", help="resnet20, 32, 44 or 56")
    parser.add_argument("--weights", required=True, help="a .safetensors file; {}: the network")
    parser.add_argument("--data", required=True, help="FILE.npz with x_train, y_train, …")
    parser.add_argument("--into", required=True, help="the folder that methods.py filled")
    parser.add_argument("--samples", type=int, default=1024)
    return parser.parse_args()


def losses(reference, logits):
    """The four losses by name, the less the better."""
    from scipy.optimize import minimize_scalar

    from proxyq.engine.divergence import kl_divergence, rescaled_divergence

    logits = np.asarray(logits, np.float64)

    def scaled(log_scale):
        return float(kl_divergence(reference, np.exp(log_scale) * logits).mean())

    return {
        "kl": scaled(0.0),
        "one scale": minimize_scalar(scaled, bounds=(-4, 4), method="bounded").fun,
        "rescaled": float(rescaled_divergence(reference, logits).mean()),
        "agreement": -float(np.mean(logits.argmax(-1) == reference.argmax(-1))),
    }


def main():
    from scipy.stats import spearmanr

    from proxyq.engine import Engine
    from proxyq.ptq.plan_edits import PlanEdits
    from proxyq.quantize import Rounding

    args = parsed()
    measured = {}
    for file in sorted(folder(args).glob("accuracy-*.json")):
        measured |= json.loads(file.read_text())
    measured.pop("float", None)
    model = load(args)
    inputs, _ = calibration(args, model, args.samples)
    engine = Engine.build(model, args.samples)
    edits = PlanEdits(engine, inputs, Rounding())
    reference = engine.logits(inputs)
    print(f"{args.network}: {len(measured)} plans, Spearman with top-1 on test images")
    for correction in CORRECTIONS:
        accuracy, rows = [], []
        for key, top1 in measured.items():
            plan = [(int(b), None) for b in key.split(",")]
            rows.append(losses(reference, engine.logits(inputs, edits(plan, correction))))
            accuracy.append(top1[correction])
        top1 = np.array(accuracy)
        for low, high in BANDS:
            own = np.flatnonzero((top1 >= low) & (top1 < high))
            if len(own) < AT_LEAST:
                continue
            found = {
                name: -spearmanr([rows[i][name] for i in own], top1[own]).statistic
                for name in rows[0]
            }
            shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"correction {correction}, top-1 {low} to {min(high, 100)} %: "
                  f"{len(own)} plans  {shown}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""OMPQ's published procedure (arXiv:2109.07865) in eager PyTorch, from a description of it.

Features of 18 tensors of a ResNet-18 (stem, first convolution and output of each block, logits)
from a forward pass in training mode without gradients; linear CKA of every ordered pair, Gram
matrices and centring made anew for each; `theta = exp(-beta gamma)` and its suffix mean; SLSQP
with the exact gradient from all ones; every way to round down or up tried.
"""

import math

import numpy as np


def torch_features(module, images):
    """Every ReLU's output and the logits, in order of execution, as `[images, elements]`."""
    import torch

    kept = []

    def keep(_module, _inputs, output):
        kept.append(output.flatten(1).cpu().float())

    measured = [m for m in module.modules() if isinstance(m, torch.nn.ReLU)] + [module.fc]
    hooks = [m.register_forward_hook(keep) for m in measured]
    module.train()
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return kept


def centred(gram):
    """Rows and columns shifted to mean zero."""
    means = gram.mean(0)
    means = means - means.mean() / 2
    return gram - means[:, None] - means[None, :]


def pairwise_orthogonality(features):
    """Linear CKA of all ordered pairs, each from its own two Gram matrices."""
    orm = np.zeros((len(features), len(features)))
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            k, m = centred(x @ x.T), centred(y @ y.T)
            orm[i, j] = float((k * m).sum() / (k.norm() * m.norm()))
    return orm


def layer_weights(orm, beta):
    """Mean of `exp(-beta gamma)` over a layer and all later ones, up to a common factor.

    The factor, the smallest gamma's, is taken out as otherwise the objective is below SLSQP's
    tolerance at once (or zero).
    """
    gamma = orm.sum(axis=1) - np.diag(orm)
    theta = np.exp(-beta * (gamma - gamma.min()))
    return np.array([theta[i:].mean() for i in range(len(theta))])


def slsqp_bits(weights, sizes, budget, low=2, high=4):
    """Fractional bits: the most weighted bits within `budget` bits, from all eights."""
    from scipy.optimize import minimize

    mib = sizes / 2**20  # at 8 bits
    room = budget / 8 / 2**20
    found = minimize(
        lambda x: -weights @ x,
        np.ones(len(weights)),
        jac=lambda x: -weights,
        method="SLSQP",
        bounds=[(low / 8, high / 8)] * len(weights),
        constraints={"type": "ineq", "fun": lambda x: room - mib @ x, "jac": lambda x: -mib},
    )
    return 8 * found.x


def rounded(bits, sizes):
    """Of all floors and ceilings the one whose size is closest below the fractional one's."""
    aim = float(sizes @ bits) + 1e-3
    best, best_size = None, -1.0
    choices = [{math.floor(b), math.ceil(b)} for b in bits]

    def descend(i, size, chosen):
        nonlocal best, best_size
        if i < 0:
            if best_size < size <= aim:
                best, best_size = chosen[::-1], size
            return
        for b in choices[i]:
            descend(i - 1, size + sizes[i] * b, [*chosen, b])

    descend(len(bits) - 1, 0.0, [])
    return best


def layer_groups(module):
    """Names of the layers behind each of the 18 tensors."""
    groups = [["conv1"]]
    for name, block in module.named_modules():
        if hasattr(block, "conv2"):
            shortcut = [f"{name}.downsample.0"] if block.downsample is not None else []
            groups += [[f"{name}.conv1"], [f"{name}.conv2", *shortcut]]
    return [*groups, ["fc"]]

"""Networks of one's own: a plain JAX function, and the same as a Flax module.

Both classify the digits by random features and a least-squares layer on top, so that nothing is
trained. The number: top-1 of the plan on the 400 test images, in percent.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import proxyq
from proxyq.model.digits import digits_images

FEATURES = 512


def flat(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as rows of 64 values from 0 to 1, and their labels."""
    images, labels = digits_images(split)
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels


x, labels = flat("calibration")
rng = np.random.default_rng(0)
hidden = rng.normal(size=(64, FEATURES)).astype(np.float32) / 8
shift = rng.uniform(-0.5, 0.5, FEATURES).astype(np.float32)
features = np.maximum(x @ hidden + shift, 0).astype(np.float64)
# Ridge regression on the classes: (F'F + c I) W = F' Y
gram = features.T @ features + 0.1 * np.eye(FEATURES)
head = np.linalg.solve(gram, features.T @ (10.0 * np.eye(10)[labels])).astype(np.float32)


# A plain function of parameters and inputs. The pytree's paths become the layers' names.
def apply(params, x):
    x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return x @ params["head"]["w"]


params = {"hidden": {"w": hidden, "b": shift}, "head": {"w": head}}
plain = proxyq.from_function(apply, params, (64,), name="random-features")


# The same as a module of Flax.
class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, 10, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


module = Net(nnx.Rngs(0))
module.hidden.kernel[...] = jnp.asarray(hidden)
module.hidden.bias[...] = jnp.asarray(shift)
module.head.kernel[...] = jnp.asarray(head)
flax = proxyq.from_nnx(module, (64,), name="random-features")

plans = [
    proxyq.search(model, x, proxy="output-error", budget="size=4bit") for model in (plain, flax)
]
print(plans[0])
assert list(plans[0].bits().values()) == list(plans[1].bits().values())

found = proxyq.evaluate(plain, [plans[0]], x, flat("test"))
print(f"\nfloat {found.float_top1:.2f} %")
print(f"top-1 of the plan: {found.plans[0].top1:.2f}")

"""Search the embedded network, run the plan, and compare it with uniform bits.

The number: top-1 of the plan on the 400 test images, in percent.
"""

import tempfile
from pathlib import Path

import proxyq

# `effort="low"` tries three costs of a few forward passes each, runs the plan of each on
# images that are held back, and keeps the best.
plan = proxyq.search(effort="low", budget="size=2.5bit")
print(plan)

# A plan is a file. Nothing but the bits, the budgets and where they came from is in it.
with tempfile.TemporaryDirectory() as folder:
    plan.save(Path(folder) / "plan.json")
    plan = proxyq.Plan.load(Path(folder) / "plan.json")

# A plan of one's own: 2 bits everywhere but in the first and the last layer.
by_hand = proxyq.search(proxy="uniform", budget="size=2bit", bits=[2], pins=["@first=8", "@last=8"])

found = proxyq.evaluate(None, [plan, by_hand], names=["searched", "by hand"])
print(f"\nfloat     {found.float_top1:6.2f} %")
if found.uniform is not None:
    print(f"uniform   {found.uniform.top1:6.2f} %  {found.uniform.average_bits:.2f} bits")
for one in found.plans:
    print(f"{one.name:<9} {one.top1:6.2f} %  {one.size_bits / 8192:.1f} KiB")
print(f"\ntop-1 of the plan: {found.plans[0].top1:.2f}")

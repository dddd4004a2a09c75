"""Evolve a proxy for a few generations, on measured plans of the embedded network.

The number: Spearman's rank correlation with accuracy on the plans that were held back. So few
formulas find no more than a glimpse: `docs/evolved_proxies.md` has what 10,000 find.
"""

import tempfile
from pathlib import Path

import proxyq

# The table of the embedded network lies on the shelf: random plans, each really measured. A
# quarter of them is held back, and chooses among what the others found.
result = proxyq.evolve(
    "digits", seed=1, population=30, generations=5, evaluations=200, leaves=["W", "D", "bits"]
)
print("generation  measured  best   nodes")
for row in result.logbook:
    measured, fitness, nodes = row["evaluations"], row["best"], row["best_size"]
    print(f"{row['generation']:10}  {measured:8}  {fitness:.3f}  {nodes:5}")

best = result.best
formula = result.formula("found")
print(f"\nfound: {formula.formula}")
print(f"on the plans that the evolution saw: {best.individual.fitness:.3f}")

# A formula is a file, and a proxy wherever the name of one is asked for.
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "found.json"
    formula.save(file)
    plan = proxyq.search(proxy=str(file), budget="size=3bit")
print(plan)
(held_back,) = best.validation
print(f"\nSpearman on the plans held back: {held_back:.3f}")

"""Several budgets that hold at once: size, bit operations and activation memory.

The number: the bit operations of the plan, in millions.
"""

import proxyq

BUDGETS = ["size=3.5bit", "bops=20M", "activation-memory=2.5KiB"]

# Bits of weights and of what layers read are chosen together, so the proxy must tell what both
# cost: `kl-delta` measures the divergence with one weight, or one input, rounded.
scores = proxyq.score(proxies="kl-delta", bits=[2, 3, 4, 8], activation_bits=[4, 8], samples=64)
plan = proxyq.allocate(scores, BUDGETS)
print(plan)

print(f"\n{'budget':<18} {'asked':>8} {'achieved':>9}")
for budget in plan.budgets:
    print(f"{budget.name:<18} {budget.asked:8.2f} {budget.achieved:9.3f} {budget.unit}")
    assert budget.achieved <= budget.asked  # checked in whole bits and operations already

# What cannot be met is said in one sentence, with what can.
try:
    proxyq.allocate(scores, [*BUDGETS[:2], "activation-memory=2KiB"])
except proxyq.InfeasibleError as error:
    print(f"\n{error}")

bops = next(budget.achieved for budget in plan.budgets if budget.name == "bops")
print(f"\nmillions of bit operations: {bops:.3f}")

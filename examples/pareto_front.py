"""What each amount of memory costs: plans over a range of budgets, from one set of scores.

The number: the smallest average width of a plan that loses at most one point of top-1.
"""

import proxyq

# Measuring takes the time, choosing does not: score once.
scores = proxyq.score(proxies="restored-error", bits=[2, 3, 4, 8])

front = proxyq.pareto(scores, budget="size=2bit..3bit", proxy="restored-error", points=8)
plans = [front.plan(place) for place in range(len(front.points))]
found = proxyq.evaluate(None, plans, names=[f"point {n}" for n in range(len(plans))])

print(f"float {found.float_top1:.2f} %\n\n   bits   predicted cost   top-1")
for point, plan, measured in zip(front.points, plans, found.plans, strict=True):
    mark = "  dominated" if point.dominated else ""
    print(f"{plan.average_bits:7.3f}   {point.predicted:14.4f}   {measured.top1:.2f} %{mark}")

good = [
    plan.average_bits
    for plan, measured in zip(plans, found.plans, strict=True)
    if measured.top1 >= found.float_top1 - 1
]
print(f"\nbits that lose at most a point: {min(good):.3f}")

"""The search: `allocate` chooses bits, `evolve` makes formulas; recipes, and the files between."""

"""Models: a pure function and named arrays, its graph, and the layers found in it."""

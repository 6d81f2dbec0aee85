"""How to compute it. `reference/` is the specification in plain PyTorch; faster kernels must match it."""

"""Planning: how many GPUs, split how, serve a workload within its targets. Asked of the simulated cluster itself."""

"""Workloads: which requests come when."""

"""Profiling: how long a live cluster's steps and hand-offs take, measured over its own API."""

"""Faults on purpose: a simulated cluster is hurt where a seed says, and whatever it must never do is looked for."""

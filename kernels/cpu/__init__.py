"""What a CPU computes faster than the reference does, with equal promises."""

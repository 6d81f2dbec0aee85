"""Plain PyTorch: the specification that every faster kernel is tested against."""

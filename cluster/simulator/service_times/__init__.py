"""Service times: how long a step takes on some device, by the step's shape."""

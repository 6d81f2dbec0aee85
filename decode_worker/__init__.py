"""The decode side of a worker: reserve, pull, adopt, and go on."""

"""`python -m cluster` is `steelyard`: the form that a Ray job uses, where nothing is installed."""

from cluster.cli import main

if __name__ == "__main__":
    main()

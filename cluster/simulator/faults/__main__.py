"""`python -m cluster.simulator.faults`."""

from cluster.simulator.faults.cli import main

if __name__ == "__main__":
    main()

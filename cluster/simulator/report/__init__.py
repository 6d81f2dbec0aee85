"""Reports: what a simulation found, as figures, as plots, as a page."""

"""What to compute: one engine without a phase, which prefill and decode workers both drive."""

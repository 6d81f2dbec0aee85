"""How KV blocks move between workers: leases, frames, the hand-off record, and carriers."""

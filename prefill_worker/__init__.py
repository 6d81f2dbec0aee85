"""The prefill side of a worker: the order of prompts, and the outbox of computed blocks."""

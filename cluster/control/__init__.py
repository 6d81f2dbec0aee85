"""The controller: keeps the ratio of prefill to decode workers right, by flipping live workers."""

"""What carries frames: gRPC between any two hosts."""

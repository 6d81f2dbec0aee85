"""gRPC between gateways and workers: .proto files, server shells, and client stubs that fit the parts' Protocols."""

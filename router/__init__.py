"""Which worker serves a request, and whether: the gateway, its requests, and the choice of workers."""

"""Embeddings: POST /v1/embeddings, over the same Generator as answers."""

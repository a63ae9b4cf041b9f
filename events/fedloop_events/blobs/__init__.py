"""Content-addressed blobs: their stores, and the tensors in them."""

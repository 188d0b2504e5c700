"""What knows nothing of Fisher information: trees, keys, batches, checks."""

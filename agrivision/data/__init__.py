"""Files → batches: sources, shards, the order of samples, decoding and augmentation."""

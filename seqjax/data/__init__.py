"""Tasks and their pipelines: random-access examples, read by TFDS, shuffled by Grain, as NumPy batches."""

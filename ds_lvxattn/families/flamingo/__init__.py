"""OpenFlamingo: its model as one of transformers, and its family."""

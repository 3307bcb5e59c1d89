"""Video decoding and datasets."""

"""What runs inside the model's forward and backward pass: attention of a batch, decoding, recomputation, times."""

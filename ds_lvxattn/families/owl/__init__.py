"""mPLUG-Owl3: the model, its published code and checkpoints, and its family."""

"""Local attention of one rank: all exchanged queries against the rank's own keys and values.

One operator a file. ``dispatch`` chooses a kernel per call; ``operator`` registers the choice with
``torch.library`` so that selective checkpointing and ``torch.compile`` see one operator, not its inside.
"""

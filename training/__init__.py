"""The command line, the demo, and the room for training and evaluation: the one that may import diffusers."""

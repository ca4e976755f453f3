"""Training, evaluation, the demo and the command line; the only room that imports diffusers and accelerate."""

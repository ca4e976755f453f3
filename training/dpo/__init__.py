"""Diffusion-DPO: the attachment to a UNet, the loss, the trainer. Knows no files but its checkpoints."""

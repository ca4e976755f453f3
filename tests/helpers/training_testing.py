"""Small diffusers UNets, adapters and batches of pairs for the tests of the training core."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter, find_sites
from comfyui_psa.training.dpo.denoising import PairBatch

CONTEXT, DIM, POOLED = 24, 6, 16


def tiny_unet(sdxl: bool = False, seed: int = 0) -> UNet2DConditionModel:
    """A frozen UNet with attn2 layers in all three stages; norms and biases are random too."""
    torch.manual_seed(seed)
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
        }
        if sdxl
        else {}
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        **extra,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet.requires_grad_(False).eval()


def tiny_adapter(unet: UNet2DConditionModel, trained: bool = False, seed: int = 1) -> PSAAdapter:
    """An adapter for ``unet``; with ``trained`` its values are random instead of zero."""
    torch.manual_seed(seed)
    sites = find_sites(unet)
    adapter = PSAAdapter(
        AdapterConfig(
            hidden_sizes=tuple(site.hidden_size for site in sites),
            cross_attention_dim=CONTEXT,
            embedding_dim=DIM,
            encoder=EncoderSpec(kind="attributes", name="attributes-1"),
        )
    )
    if trained:
        with torch.no_grad():
            for site in adapter.sites.parameters():
                site.normal_(std=0.3)
    return adapter


def pair_batch(pairs: int = 3, sdxl: bool = False, seed: int = 2, dropped: tuple[int, ...] = ()) -> PairBatch:
    """A batch of random pairs at different timesteps; the users ``dropped`` are the null user."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return PairBatch(
        rows=tuple(range(pairs)),
        chosen=normal(pairs, 4, 8, 8),
        rejected=normal(pairs, 4, 8, 8),
        noise=normal(pairs, 4, 8, 8),
        timesteps=torch.randint(1000, (pairs,), generator=generator),
        text=normal(pairs, 5, CONTEXT),
        embedding=normal(pairs, DIM),
        dropped=torch.tensor([i in dropped for i in range(pairs)]),
        pooled=normal(pairs, POOLED) if sdxl else None,
        time_ids=torch.tensor([[64.0, 48.0, 3.0, 0.0, 64.0, 64.0]] * pairs) if sdxl else None,
    )

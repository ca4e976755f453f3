"""The parts of the miniature, untrained, in the classes of diffusers and transformers.

The UNet and the text model are those of Stable Diffusion 1.x, only smaller: 12 x 12 latents of 96 px, 17
cross-attention layers, 32 text tokens. Latents have sixteen channels, and the UNet predicts v.
"""

from __future__ import annotations

from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

LATENT_CHANNELS = 16
LATENT_SIZE = 12
TOKENS = 32
TEXT_DIM = 128


def make_unet() -> UNet2DConditionModel:
    """Return the UNet, 3.2 million parameters.

    Equally wide everywhere, with cross-attention at full size: a narrow first level has no room to carry sixteen noisy
    channels past, and without attention there it draws places long before it draws objects.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,  # the number of heads, under diffusers' old name
        transformer_layers_per_block=(1, 2, 2),
    )


def make_autoencoder() -> AutoencoderTiny:
    """Return an autoencoder of TAESD's architecture, half as wide and with sixteen latent channels.

    Its scaling factor is measured when it is trained.
    """
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(2, 2, 2, 1),
        scaling_factor=1.0,
    )


def make_text_encoder(vocabulary: int, start: int, end: int) -> CLIPTextModel:
    """Return a CLIP text model for a vocabulary of that size, with the ids of its first and last token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def make_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule.

    The miniature predicts v, as SD2.x does: with epsilon, errors at high noise count for little in training and are
    multiplied by 15 in the picture, and a short training leaves them large.
    """
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )

"""The loss of a training step, computed from the images on with the pipeline's own parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers_testing import TwoBranchUNet
from observed_runs import Run, embedding
from pairs import read_metadata
from safetensors.torch import load_file
from torch import Tensor
from training_runs import checkpoint

from comfyui_psa.training.data.users import read_profile
from comfyui_psa.training.dpo.draws import Draws


@torch.no_grad()
def loss_by_hand(run: Run, data: Path, step: int) -> float:
    """The mean loss of a step's pairs: VAE, text encoders, true two-branch attention, the formula."""
    pipeline, loss = run.base.pipeline, run.config.loss
    tensors = load_file(checkpoint(run.config, step - 1) / "adapter.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    users = {row["user_data"]["User_ID"]: row["user_data"] for row in read_metadata(data)}
    embeddings = {user: embedding(read_profile(values, user))[0] for user, values in users.items()}
    mean, deviation = mean_and_deviation(torch.stack(list(embeddings.values())))
    policy, reference = _two_branch(pipeline.unet, tensors), _two_branch(pipeline.unet, tensors)

    pairs_per_step = run.config.run.batch_size * run.config.run.accumulation
    draws = Draws(run.config.run.seed, 1000, loss.prompt_dropout, loss.user_dropout, loss.noise_offset)
    rows, losses, dropped = read_metadata(data), [], []
    for sample in range((step - 1) * pairs_per_step, step * pairs_per_step):
        epoch, position = divmod(sample, len(rows))
        row, draw = rows[int(draws.order(epoch, len(rows))[position])], draws.draw(sample, (4, 8, 8))
        dropped.append((draw.prompt_dropped, draw.user_dropped))
        caption = "" if draw.prompt_dropped else row["caption"]
        user = (embeddings[row["user_data"]["User_ID"]] - mean) / deviation
        user = torch.zeros_like(user) if draw.user_dropped else user
        text, added = _encoded_prompt(pipeline, caption)
        errors = []
        for side in ("chosen", "rejected"):
            latent = _encoded_image(pipeline.vae, data / row[side])
            noisy, target = _noised(pipeline, latent, draw.noise[None], draw.timestep)
            for unet, who in ((policy, user[None]), (reference, None)):
                predicted = unet(noisy, draw.timestep, text, who, **added)
                errors.append(F.mse_loss(predicted, target).double())
        chosen, chosen_reference, rejected, rejected_reference = errors
        inside = -loss.beta / 2 * ((chosen - rejected) - (chosen_reference - rejected_reference))
        losses.append(-F.logsigmoid(inside))
    assert len(set(dropped)) == 4  # with and without prompt, with and without user
    return float(torch.stack(losses).mean())


def _two_branch(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> TwoBranchUNet:
    """A copy of the UNet with the paper's attention; its keys, which have no effect, are random."""
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    layers = {}
    for i in range(sum("to_v_user" in name for name in tensors)):
        layers[f"{i}.to_v_user.0.weight"] = value = tensors[f"sites.{i}.to_v_user.weight"]
        layers[f"{i}.to_k_user.0.weight"] = torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    projection = {k.removeprefix("user_proj."): v for k, v in tensors.items() if k.startswith("user_proj.")}
    return TwoBranchUNet(copy.eval(), {"psa_adapter": layers, "user_proj": projection})


def _encoded_prompt(pipeline: DiffusionPipeline, caption: str) -> tuple[Tensor, dict[str, Any]]:
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if not hasattr(pipeline, "text_encoder_2"):
        return pipeline.encode_prompt(caption, **options)[0], {}
    text, _, pooled, _ = pipeline.encode_prompt(caption, **options)
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return text, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _encoded_image(vae: AutoencoderKL, path: Path) -> Tensor:
    images = torch.tensor(np.asarray(PIL.Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1
    return vae.encode(images).latent_dist.mean * vae.config.scaling_factor


def _noised(pipeline: DiffusionPipeline, latent: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """The noisy latent and what the UNet should say to it."""
    config = pipeline.scheduler.config
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    alpha = DDPMScheduler(**schedule, rescale_betas_zero_snr=zero_snr).alphas_cumprod[timestep]
    noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    is_v = config.prediction_type == "v_prediction"
    return noisy, alpha.sqrt() * noise - (1 - alpha).sqrt() * latent if is_v else noise


def mean_and_deviation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Of embeddings ``[users, dim]``; what hardly differs is not scaled."""
    deviation = embeddings.std(dim=0, correction=0)
    return embeddings.mean(dim=0), torch.where(deviation > 1e-6, deviation, torch.ones(()))

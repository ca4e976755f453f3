"""The loss of a training step, computed from the images on with the pipeline's own parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class StepByHand(NamedTuple):
    """Means over the preferences of a step: the loss, and by how much chosen images got worse, weighted.

    With fidelity ``deviation`` is that of the other pairs, which show what their user allows.
    """

    loss: float
    anchor: float
    deviation: float


def loss_by_hand(run: Run, data: Path, step: int) -> float:
    """The mean loss of a step's pairs."""
    return step_by_hand(run, data, step).loss


@torch.no_grad()
def step_by_hand(run: Run, data: Path, step: int) -> StepByHand:
    """A step from the images on: VAE, text encoders, true two-branch attention, the formula."""
    pipeline, loss = run.base.pipeline, run.config.loss
    beta, winner_anchor = loss.beta, loss.winner_anchor
    if step - 1 >= loss.switch_at * run.config.run.steps:
        beta = beta if loss.final_beta is None else loss.final_beta
        winner_anchor = winner_anchor if loss.final_winner_anchor is None else loss.final_winner_anchor
    tensors = load_file(checkpoint(run.config, step - 1) / "adapter.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    users = {row["user_data"]["User_ID"]: row["user_data"] for row in read_metadata(data)}
    embeddings = {user: embedding(read_profile(values, user))[0] for user, values in users.items()}
    mean, deviation = mean_and_deviation(torch.stack(list(embeddings.values())))
    policy, reference = _two_branch(pipeline.unet, tensors), _two_branch(pipeline.unet, tensors)

    pairs_per_step = run.config.run.batch_size * run.config.run.accumulation
    rates = (loss.prompt_dropout, loss.user_dropout, loss.noise_offset)
    draws = Draws(run.config.run.seed, 1000, *rates, loss.min_timestep, loss.noises_per_pair)
    rows, losses, dropped = read_metadata(data), [], []
    anchors, deviations = [], []
    for sample in range((step - 1) * pairs_per_step, step * pairs_per_step):
        epoch, position = divmod(sample, len(rows))
        number = int(draws.order(epoch, len(rows))[position])
        row, draw = rows[number], draws.draw(sample, (4, 8, 8), number, epoch)
        dropped.append((draw.prompt_dropped, draw.user_dropped))
        caption = "" if draw.prompt_dropped else row["caption"]
        user = (embeddings[row["user_data"]["User_ID"]] - mean) / deviation
        user = torch.zeros_like(user) if draw.user_dropped else user
        text, added = _encoded_prompt(pipeline, caption)
        errors, apart = [], []
        for side in ("chosen", "rejected"):
            latent = _encoded_image(pipeline.vae, data / row[side])
            noisy, target = _noised(pipeline, latent, draw.noise[None], draw.timestep)
            said = [
                unet(noisy, draw.timestep, text, who, **added)
                for unet, who in ((policy, user[None]), (reference, None))
            ]
            errors += [F.mse_loss(predicted, target).double() for predicted in said]
            apart.append(F.mse_loss(*said).double())
        chosen, chosen_reference, rejected, rejected_reference = errors
        weight = _weight(pipeline, draw.timestep, loss.timestep_weight_limit)
        if loss.fidelity and _is_allowed(row, draw.user_dropped):
            deviations.append(sum(apart) / 2)
            continue
        inside = -beta / 2 * weight * ((chosen - rejected) - (chosen_reference - rejected_reference))
        anchors.append(weight * (chosen - chosen_reference))
        losses.append(-F.logsigmoid(inside) + winner_anchor * anchors[-1])
    assert len(set(dropped)) == 4  # with and without prompt, with and without user
    return StepByHand(*(float(torch.stack(found).mean()) if found else 0.0 for found in (losses, anchors, deviations)))


def _is_allowed(row: Mapping[str, Any], nobody: bool) -> bool:
    """Whether a row's user allows what it shows; nobody allows everything, and others nothing that is unknown."""
    shown = (row["category"] or "").casefold()
    banned = [name.casefold() for name in row["user_data"]["Banned_Categories"]]
    return nobody or bool(shown and shown not in banned)


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
    alpha = _alpha(pipeline, timestep)
    noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    return noisy, alpha.sqrt() * noise - (1 - alpha).sqrt() * latent if _predicts_v(pipeline) else noise


def _weight(pipeline: DiffusionPipeline, timestep: int, limit: float) -> float:
    """How much larger the mean square is in the picture than in the prediction, up to a limit."""
    alpha = float(_alpha(pipeline, timestep))
    return min(1 - alpha if _predicts_v(pipeline) else (1 - alpha) / alpha, limit) if limit else 1.0


def _alpha(pipeline: DiffusionPipeline, timestep: int) -> Tensor:
    """The share of the picture, squared."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    zero_snr = bool(pipeline.scheduler.config.get("rescale_betas_zero_snr"))
    return DDPMScheduler(**schedule, rescale_betas_zero_snr=zero_snr).alphas_cumprod[timestep]


def _predicts_v(pipeline: DiffusionPipeline) -> bool:
    return pipeline.scheduler.config.prediction_type == "v_prediction"


def mean_and_deviation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Of embeddings ``[users, dim]``; what hardly differs is not scaled."""
    deviation = embeddings.std(dim=0, correction=0)
    return embeddings.mean(dim=0), torch.where(deviation > 1e-6, deviation, torch.ones(()))

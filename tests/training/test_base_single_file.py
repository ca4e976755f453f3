"""Single-file checkpoints: UNet and VAE compute what ComfyUI's models compute with the same weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.supported_models
import pytest
import torch
from checkpoints import (
    SD1,
    SD2,
    SDXL,
    UNET,
    VAE,
    autoencoder,
    behind,
    sd1_weights,
    sd2_weights,
    sdxl_weights,
    tiny_autoencoder,
)
from comfy_testing import CPU, ROUNDING, difference, noise, unet_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from comfyui_psa.training import synthetic
from comfyui_psa.training.base import open_base
from comfyui_psa.training.base.detection import unet_config
from comfyui_psa.training.errors import BaseModelError
from comfyui_psa.training.synthetic import UNetShape, unet_shapes

Weights = dict[str, Tensor]
OTHER_SIZE = replace(SD1, channel_mult=(1, 2), res_blocks=1, transformer_depth=(0, 2), middle_depth=2)
HEADS = {"num_heads": 8, "num_head_channels": -1}
HEAD_CHANNELS = {"num_heads": -1, "num_head_channels": 64}
# height, width, top, left, height, width: all different
TIME_IDS = (768, 512, 8, 16, 704, 448)


def write(path: Path, weights: Mapping[str, Tensor]) -> Path:
    save_file(dict(weights), path)
    return path


def like_ssd(weights: Weights) -> Weights:
    """Take out what SSD-1B lacks: the middle's attention, and some depth on the way up."""
    gone = re.compile(
        r"middle_block\.[12]\.|output_blocks\.(1\.1\.transformer_blocks\.2|4\.1\.transformer_blocks\.1)\."
    )
    return {name: weight for name, weight in weights.items() if not gone.match(name)}


def like_koala(weights: Weights) -> Weights:
    """Take out the middle, which KOALA-700M lacks."""
    return {name: weight for name, weight in weights.items() if not name.startswith("middle_block.")}


def comfy_prediction(weights: Weights, family: Any, heads: dict[str, int], context: Tensor, pooled: Tensor) -> Tensor:
    config = comfy.model_detection.detect_unet_config(dict(weights), "")
    model_config = family(config | heads)
    model_config.unet_config |= heads
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "")
    model.load_model_weights(dict(weights), "")
    height, width, top, left, target_height, target_width = TIME_IDS
    sizes = {"height": height, "width": width, "crop_h": top, "crop_w": left}
    y = model.encode_adm(
        pooled_output=pooled, target_height=target_height, target_width=target_width, device=CPU, **sizes
    )
    timesteps = torch.tensor([500.0, 20.0])
    return model.diffusion_model(noise(2, 4, 16, 16), timesteps, context=context, y=y)


@pytest.mark.parametrize(
    ("shape", "whole", "family", "heads", "change"),
    [
        (SD1, sd1_weights, comfy.supported_models.SD15, HEADS, dict),
        (SD2, sd2_weights, comfy.supported_models.SD20, HEAD_CHANNELS, dict),
        (SDXL, sdxl_weights, comfy.supported_models.SDXL, HEAD_CHANNELS, dict),
        (SDXL, sdxl_weights, comfy.supported_models.SDXL, HEAD_CHANNELS, like_ssd),
        (SDXL, sdxl_weights, comfy.supported_models.SDXL, HEAD_CHANNELS, like_koala),
        (OTHER_SIZE, sd1_weights, comfy.supported_models.SD15, HEADS, dict),
    ],
    ids=["SD1", "SD2", "SDXL", "SSD-1B", "KOALA", "another size"],
)
@torch.no_grad()
def test_unet_predicts_what_comfyui_predicts(
    tmp_path: Path,
    shape: UNetShape,
    whole: Callable[[UNetShape], Weights],
    family: Any,
    heads: dict[str, int],
    change: Callable[[Weights], Weights],
) -> None:
    weights = change(unet_weights(shape))
    others = {name: weight for name, weight in whole(shape).items() if not name.startswith(UNET)}
    base = open_base(write(tmp_path / "base.safetensors", others | behind(UNET, weights)))
    context, pooled = noise(2, 5, shape.context_dim, seed=1), noise(2, 32, seed=2)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS, TIME_IDS])}
    predicted = base.unet(torch.float32)(
        noise(2, 4, 16, 16),
        torch.tensor([500, 20]),
        context,
        added_cond_kwargs=added if base.is_sdxl else None,
    ).sample

    assert base.is_sdxl == bool(shape.adm_channels)
    assert difference(predicted, comfy_prediction(weights, family, heads, context, pooled)) < ROUNDING


def test_the_unet_is_frozen_and_of_the_dtype_asked_for(tmp_path: Path) -> None:
    base = open_base(write(tmp_path / "base.safetensors", sd1_weights()))
    unet = base.unet(torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not unet.training
    empty = base.empty_unet()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in unet.named_parameters()}
    assert base.unet_config["cross_attention_dim"] == 64


@torch.no_grad()
@pytest.mark.parametrize(("whole", "scale"), [(sd1_weights, 0.18215), (sdxl_weights, 0.13025)], ids=["SD1", "SDXL"])
def test_vae_gives_the_mean_that_comfyui_s_gives(tmp_path: Path, whole: Callable[[], Weights], scale: float) -> None:
    base = open_base(write(tmp_path / "base.safetensors", whole()))
    coder, reference = base.vae(CPU), autoencoder()
    images = noise(2, 3, 32, 48).clamp(-1, 1)
    latents = coder.encode(images)
    # ComfyUI draws from the distribution; the mean is the first half of its parameters.
    mean, _ = reference.quant_conv(reference.encoder(images)).chunk(2, dim=1)
    assert latents.shape == (2, 4, 4, 6)
    assert difference(latents, mean * scale) < ROUNDING
    assert torch.equal(coder.encode(images), latents)
    assert difference(coder.decode(latents), reference.decode(latents / scale).clamp(-1, 1)) < ROUNDING
    assert (base.latent_channels, base.vae_scale_factor) == (4, 8)


@torch.no_grad()
@pytest.mark.parametrize("own", [(1.0, 0.0), (0.18215, 0.1)], ids=["as it is", "own scale"])
def test_tiny_vae_is_scaled_as_comfyui_scales_it(tmp_path: Path, own: tuple[float, float]) -> None:
    reference = tiny_autoencoder(*own)
    weights = {name: weight for name, weight in sd1_weights().items() if not name.startswith(VAE)}
    weights |= behind(VAE, reference.state_dict())
    if own == (1.0, 0.0):
        del weights[f"{VAE}vae_scale"], weights[f"{VAE}vae_shift"]
    base = open_base(write(tmp_path / "base.safetensors", weights))
    coder, images = base.vae(CPU), noise(2, 3, 32, 48).clamp(-1, 1)
    latents = coder.encode(images)
    assert difference(latents, reference.encode(images) * 0.18215) < ROUNDING
    assert difference(coder.decode(latents), reference.decode(latents / 0.18215).clamp(-1, 1)) < ROUNDING
    assert (base.latent_channels, base.vae_scale_factor) == (4, 8)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_the_same_as_safetensors(tmp_path: Path, wrapped: bool) -> None:
    weights = sd1_weights()
    content = {"state_dict": weights, "global_step": 7} if wrapped else weights
    torch.save(content, tmp_path / "base.ckpt")
    unet = open_base(tmp_path / "base.ckpt").unet(torch.float32)
    expected = open_base(write(tmp_path / "base.safetensors", weights)).unet(torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(unet.state_dict()[name], weight)


class Touch:
    """Pickles to a command that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(sd1_weights() | {"more": Touch(tmp_path / "ran")}, tmp_path / "base.ckpt")
    with pytest.raises(BaseModelError, match=r"holds more than weights.*\.safetensors"):
        open_base(tmp_path / "base.ckpt")
    assert not (tmp_path / "ran").exists()


def test_prediction_type_is_read_from_the_file(tmp_path: Path) -> None:
    marked = sdxl_weights() | {"v_pred": torch.tensor([])}
    zero = marked | {"ztsnr": torch.tensor([])}
    plain = open_base(write(tmp_path / "plain.safetensors", sdxl_weights()))
    velocity = open_base(write(tmp_path / "velocity.safetensors", marked))
    terminal = open_base(write(tmp_path / "terminal.safetensors", zero))
    assert [base.prediction_type for base in (plain, velocity, terminal)] == ["epsilon", "v_prediction", "v_prediction"]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0).float()
    for base in (plain, velocity):
        torch.testing.assert_close(base.noise_scheduler().alphas_cumprod, expected)
        assert base.noise_scheduler().config.prediction_type == base.prediction_type
    assert float(terminal.noise_scheduler().alphas_cumprod[-1]) == 0
    assert float(terminal.noise_scheduler().alphas_cumprod[0]) == pytest.approx(float(expected[0]))
    forced = open_base(tmp_path / "plain.safetensors", "v_prediction")
    assert forced.prediction_type == forced.noise_scheduler().config.prediction_type == "v_prediction"


@pytest.mark.parametrize(("deviation", "expected"), [(0.2, "v_prediction"), (0.02, "epsilon")])
def test_sd2_tells_what_it_predicts_as_in_comfyui(tmp_path: Path, deviation: float, expected: str) -> None:
    shape = UNetShape(64, (1, 1, 1, 1), 2, (1, 1, 1, 0), 1, 1024, linear_projection=True)
    weights = sd2_weights(shape, vocabulary=512)
    sign = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    weights[sign] = deviation * nn.functional.layer_norm(noise(64), (64,))
    config = comfy.model_detection.detect_unet_config(dict(weights), UNET)
    family = comfy.supported_models.SD20(config | HEAD_CHANNELS)
    assert (family.model_type(weights, UNET).name == "V_PREDICTION") == (expected == "v_prediction")
    assert open_base(write(tmp_path / "base.safetensors", weights)).prediction_type == expected


def test_fingerprint_is_of_the_content_and_the_part(tmp_path: Path) -> None:
    weights = sd1_weights()
    a = open_base(write(tmp_path / "a.safetensors", weights))
    b = open_base(write(tmp_path / "b.safetensors", weights))
    assert a.fingerprint("unet") == b.fingerprint("unet")
    assert len({a.fingerprint(part) for part in ("unet", "vae", "text")}) == 3
    before = a.fingerprint("text")
    weights["cond_stage_model.logit_scale"] = torch.tensor(1.0)
    write(tmp_path / "a.safetensors", weights)
    assert a.fingerprint("text") != before


def without(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if not name.startswith(prefix)}


def adding(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("whole", "change", "message"),
    [
        (sd1_weights, lambda weights: behind("flux.", weights), "no complete checkpoint"),
        (sd1_weights, lambda weights: {f"{UNET}double_blocks.0.x": noise(2)}, "without a UNet"),
        (sd1_weights, without(VAE), "has no VAE"),
        (sd1_weights, without("cond_stage_model."), "has not the text encoder of its family"),
        (sdxl_weights, without("conditioner.embedders.0."), "refiner"),
        (sd1_weights, without(f"{UNET}middle_block.0.in_layers.0."), "2 weights are missing"),
        (sd1_weights, without(f"{UNET}time_embed.0."), "2 weights are missing"),
        (sd1_weights, without(f"{VAE}decoder.mid.attn_1.k."), "2 weights are missing"),
        (sd1_weights, without("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2."), "2 weights are"),
        (sdxl_weights, without("conditioner.embedders.1.model.positional_embedding"), "is incomplete"),
        (sd1_weights, without(f"{UNET}out.2."), "none that diffusers has"),
        (sd1_weights, without(f"{UNET}input_blocks.2."), "none that diffusers has"),
        (sd1_weights, adding(f"{UNET}time_embed.0.weight", 8, 32), "expected \\[128, 32\\]"),
        (sd1_weights, adding(f"{UNET}input_blocks.0.0.weight", 32, 9, 3, 3), "inpainting"),
        (sd1_weights, adding("edm_mean", 4), "EDM"),
        (sd1_weights, adding(f"{UNET}out.2.scale_weight"), "fp8"),
        (lambda: sd1_weights(replace(SD1, context_dim=80)), dict, "reads 80 numbers per token.*writes 64"),
        (lambda: sdxl_weights(replace(SDXL, adm_channels=99)), dict, "told 99 numbers besides the text, expected 1568"),
        (lambda: sd1_weights(replace(SD1, middle_depth=2, transformer_depth=(1, 1, 1))), dict, "middle is 2 deep"),
    ],
)
def test_what_is_no_whole_base_model_is_refused(
    tmp_path: Path, whole: Callable[[], Weights], change: Callable[[Weights], Weights], message: str
) -> None:
    path = write(tmp_path / "base.safetensors", change(whole()))
    with pytest.raises(BaseModelError, match=message) as error:
        open_base(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["base.safetensors", "base.ckpt"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "page", "cut off"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        save_file({"x": noise(1000)}, path) if name.endswith("s") else torch.save({"x": noise(1000)}, path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(BaseModelError, match=f"{name}.*(cannot be read|holds more than weights)"):
        open_base(path)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no base model .*absent\.safetensors"):
        open_base(tmp_path / "absent.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseModelError, match=r"model\.gguf is no base model"):
        open_base(tmp_path / "model.gguf")


def test_full_sizes_are_described_as_their_diffusers_folders_are() -> None:
    """Values from unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0."""
    sd15 = unet_config(dict(unet_shapes(synthetic.SD15)))
    assert sd15["block_out_channels"] == [320, 640, 1280, 1280]
    assert sd15["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert sd15["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (sd15["attention_head_dim"], sd15["cross_attention_dim"], sd15["layers_per_block"]) == (8, 768, 2)
    assert sd15["transformer_layers_per_block"] == [1, 1, 1, 1]

    sdxl = unet_config(dict(unet_shapes(synthetic.SDXL)))
    assert sdxl["block_out_channels"] == [320, 640, 1280]
    assert sdxl["attention_head_dim"] == [5, 10, 20]
    assert sdxl["transformer_layers_per_block"] == [1, 2, 10]
    assert (sdxl["use_linear_projection"], sdxl["cross_attention_dim"]) == (True, 2048)
    assert (sdxl["addition_time_embed_dim"], sdxl["projection_class_embeddings_input_dim"]) == (256, 2816)

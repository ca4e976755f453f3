"""Load PSA Miniature: the same model in ComfyUI and in diffusers, through stock nodes, LoRA and PSA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_testing import ROUNDING, denoise, difference, noise, sigma_at
from diffusers import AutoencoderTiny, EulerDiscreteScheduler
from effects import site_vectors
from miniature_testing import Reference, copied, edit, encode, randomised, write_miniature
from safetensors.torch import load_file
from schemas import NODES
from torch import Tensor, nn

import nodes as stock_nodes
from comfyui_psa.adapter import AdapterConfig, EncoderSpec, PSAAdapter, find_sites, save_adapter
from comfyui_psa.nodes import folders, miniature
from comfyui_psa.nodes.miniature_files import FILES
from comfyui_psa.nodes.miniature_model import Miniature, load_miniature
from comfyui_psa.profiles import SafetyEmbedding
from comfyui_psa.training.dpo.attachment import Attachment
from comfyui_psa.training.miniature.architecture import LATENT_CHANNELS, make_scheduler, make_unet

PROMPT = "a red Ball, beside something unheard-of"
NEGATIVE = ""
SIZE = 96
LATENT = (1, LATENT_CHANNELS, 12, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Miniature:
    return load_miniature(folder)


@pytest.fixture
def reference(folder: Path) -> Reference:
    """One for each test, which may change it."""
    return Reference(folder)


@pytest.mark.parametrize("prompt", [PROMPT, "", "zebra & 7 ÄÖ", "a red " * 10])
def test_text_is_what_transformers_makes_of_it(loaded: Miniature, reference: Reference, prompt: str) -> None:
    ((ours, _),) = encode(loaded, prompt)
    theirs = reference.encode(prompt)
    assert difference(reference.encode("another"), theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


def test_a_long_prompt_goes_on_in_a_second_section(loaded: Miniature) -> None:
    ((ours, _),) = encode(loaded, "a red " * 20)
    assert ours.shape == (1, 64, 128)
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("latent", [noise(*LATENT), noise(2, LATENT_CHANNELS, 16, 8)], ids=["square", "two upright"])
def test_the_picture_is_what_diffusers_predicts(loaded: Miniature, reference: Reference, latent: Tensor) -> None:
    positive, negative = encode(loaded, PROMPT), encode(loaded, NEGATIVE)
    sigma = sigma_at(loaded.model)
    ours = denoise(loaded.model, positive, negative, latent)
    theirs = torch.cat([reference.denoised(image[None], sigma, PROMPT) for image in latent])
    assert difference(torch.cat([reference.denoised(image[None], sigma, NEGATIVE) for image in latent]), theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


def test_a_model_that_predicts_epsilon(folder: Path, tmp_path: Path, reference: Reference) -> None:
    edit(copied(folder, tmp_path), "scheduler/scheduler_config.json", prediction_type="epsilon")
    loaded = load_miniature(tmp_path)
    latent, sigma = noise(*LATENT), sigma_at(loaded.model)
    ours = denoise(loaded.model, encode(loaded, PROMPT), encode(loaded, NEGATIVE), latent)
    epsilon = reference.predict(latent, sigma, PROMPT)
    assert difference(ours, latent - sigma * epsilon) < ROUNDING


def test_the_noise_schedule_is_the_schedulers(folder: Path, tmp_path: Path) -> None:
    edit(copied(folder, tmp_path), "scheduler/scheduler_config.json", beta_start=0.001, beta_end=0.02)
    ours = load_miniature(tmp_path).model.model.model_sampling.sigmas
    alphas = make_scheduler().from_pretrained(tmp_path / "scheduler").alphas_cumprod
    assert difference(ours, ((1 - alphas) / alphas).sqrt()) < ROUNDING


def test_pictures_and_latents_are_those_of_diffusers(loaded: Miniature, reference: Reference) -> None:
    pixels = torch.rand(2, 96, 64, 3, generator=torch.Generator().manual_seed(4))
    (ours,) = stock_nodes.VAEEncode().encode(loaded.vae, pixels)
    with torch.no_grad():
        theirs = reference.vae.encode(pixels.movedim(-1, 1) * 2 - 1).latents
        expected = (reference.vae.decode(theirs).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert ours["samples"].shape == (2, LATENT_CHANNELS, 12, 8)
    assert difference(ours["samples"], theirs) < ROUNDING
    (pictures,) = stock_nodes.VAEDecode().decode(loaded.vae, ours)
    assert pictures.shape == pixels.shape
    assert expected.std() > 0.05
    assert difference(pictures, expected) < ROUNDING


def test_an_autoencoder_of_another_size(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    shutil.rmtree(tmp_path / "vae")
    other = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(24,) * 3,
        decoder_block_out_channels=(16,) * 3,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(1, 2, 1),
        scaling_factor=0.5,
    )
    randomised(other, 5).save_pretrained(tmp_path / "vae")
    loaded, theirs = load_miniature(tmp_path), other.float()
    latent = noise(1, LATENT_CHANNELS, 6, 5)
    with torch.no_grad():
        expected = (theirs.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert difference(loaded.vae.decode(latent), expected) < ROUNDING
    assert loaded.vae.encode(expected).shape == latent.shape
    assert torch.equal(loaded.model.model.process_latent_in(latent), latent * 0.5)


@torch.no_grad()
def test_a_graph_of_stock_nodes_draws_what_diffusers_draws(loaded: Miniature, reference: Reference) -> None:
    steps, cfg, seed = 4, 3.0, 11  # four steps of "normal" are whole timesteps
    (empty,) = stock_nodes.EmptyLatentImage().generate(SIZE, SIZE)
    assert empty["samples"].shape == (1, 4, 12, 12)
    positive, negative = encode(loaded, PROMPT), encode(loaded, NEGATIVE)
    (latent,) = stock_nodes.KSampler().sample(
        loaded.model, seed, steps, cfg, "euler", "normal", positive, negative, empty, denoise=1.0
    )
    (picture,) = stock_nodes.VAEDecode().decode(loaded.vae, latent)

    scheduler = EulerDiscreteScheduler.from_config(make_scheduler().config, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [999, 666, 333, 0]
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(seed))
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        halves = [reference.unet(scaled, timestep, reference.encode(text)).sample for text in (NEGATIVE, PROMPT)]
        x = scheduler.step(halves[0] + cfg * (halves[1] - halves[0]), timestep, x).prev_sample
    expected = (reference.vae.decode(x).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert picture.shape == (1, SIZE, SIZE, 3)
    assert difference(latent["samples"], x) < 10 * ROUNDING  # rounding of every step is carried on
    assert difference(picture, expected) < 10 * ROUNDING


@pytest.mark.parametrize("name", ["down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"])
def test_a_lora_finds_its_layers_in_the_unet(loaded: Miniature, reference: Reference, name: str) -> None:
    path = f"{name}.transformer_blocks.1.attn2.to_out.0"
    latent, sigma = noise(*LATENT), sigma_at(loaded.model)
    before = reference.denoised(latent, sigma, PROMPT)
    lora = trained_lora("lora_unet_" + path.replace(".", "_"), reference.unet.get_submodule(path))
    model, _ = comfy.sd.load_lora_for_models(loaded.model, loaded.clip, lora, 1.0, 1.0)
    ours = denoise(model, encode(loaded, PROMPT), encode(loaded, NEGATIVE), latent)
    theirs = reference.denoised(latent, sigma, PROMPT)
    assert difference(before, theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


def test_a_lora_finds_its_layers_in_the_text_encoder(loaded: Miniature, reference: Reference) -> None:
    before = reference.encode(PROMPT)
    layer = reference.text_encoder.get_submodule("encoder.layers.1.mlp.fc2")
    lora = trained_lora("lora_te_text_model_encoder_layers_1_mlp_fc2", layer)
    _, clip = comfy.sd.load_lora_for_models(loaded.model, loaded.clip, lora, 1.0, 1.0)
    ((ours, _),) = encode(loaded._replace(clip=clip), PROMPT)
    theirs = reference.encode(PROMPT)
    assert difference(before, theirs) > 0.1
    # ComfyUI keeps the weights of text encoders in half precision, patched ones too.
    assert difference(ours, theirs) < 2e-3


@torch.no_grad()
def trained_lora(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """Random low-rank weights in kohya's names, added to ``layer``."""
    generator = torch.Generator().manual_seed(6)
    weight = layer.get_parameter("weight")
    up = 0.3 * torch.randn(weight.shape[0], 4, generator=generator)
    down = 0.3 * torch.randn(4, weight.shape[1], generator=generator)
    weight += up @ down
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}


def test_precision_is_that_of_the_machine_not_of_the_files(folder: Path, loaded: Miniature) -> None:
    assert load_file(folder / FILES[1])["conv_in.weight"].dtype == torch.float16
    models = (loaded.model.model.diffusion_model, loaded.vae.first_stage_model)
    assert {weight.dtype for model in models for weight in model.parameters()} == {torch.float32}
    assert loaded.model.load_device == comfy.model_management.get_torch_device()


# -- PSA on it


@pytest.fixture
def nodes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Our nodes in a ComfyUI without files of its own, with the random miniature in the pack and an adapter for it."""
    pack = copied(folder, tmp_path / "pack")
    for module in (folders, miniature):
        monkeypatch.setattr(module, "MINIATURE", pack)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "models" / "psa_adapters").mkdir(parents=True)
    (pack / "adapters").mkdir()
    save_adapter(random_adapter(), pack / "adapters" / "shipped.safetensors")
    folders.register_folders()
    return {node.GET_SCHEMA().node_id: node for node in NODES.values()}


def random_adapter(seed: int = 0) -> PSAAdapter:
    sites = find_sites(make_unet())
    config = AdapterConfig(
        hidden_sizes=tuple(site.hidden_size for site in sites),
        cross_attention_dim=sites[0].cross_attention_dim,
        embedding_dim=6,
        encoder=EncoderSpec(kind="attributes", name="attributes-1"),
    )
    assert config.base == "miniature"
    adapter = PSAAdapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return adapter


def test_sites_are_the_same_in_both_runtimes(loaded: Miniature, reference: Reference) -> None:
    ours, theirs = find_sites(loaded.model.model.diffusion_model), find_sites(reference.unet)
    assert len(ours) == 17
    assert [(site.key, site.hidden_size) for site in ours] == [(site.key, site.hidden_size) for site in theirs]


@pytest.mark.parametrize("cfg", [1.0, 0.0, 5.0])
def test_an_adapter_beside_it_steers_it_as_in_training(nodes: dict[str, Any], reference: Reference, cfg: float) -> None:
    loaded = Miniature(*nodes["PSALoadMiniature"].execute().args)
    assert nodes["PSALoadAdapter"].INPUT_TYPES()["required"]["adapter_name"][1]["options"] == ["shipped.safetensors"]
    assert nodes["PSALoadAdapter"].validate_inputs(adapter_name="shipped.safetensors") is True
    (adapter,) = nodes["PSALoadAdapter"].execute(adapter_name="shipped.safetensors").args
    embedding = SafetyEmbedding(torch.randn(1, 6, generator=torch.Generator().manual_seed(8)))
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    (model,) = nodes["PSAApply"].execute(model=loaded.model, adapter=adapter, embedding=embedding, **settings).args
    positive, negative = encode(loaded, PROMPT), encode(loaded, NEGATIVE)
    latent, sigma = noise(*LATENT), sigma_at(loaded.model)
    ours = denoise(model, positive, negative, latent, cfg)

    attachment = Attachment(reference.unet, find_sites(reference.unet))
    with torch.no_grad():
        vectors = site_vectors(random_adapter(), embedding.vectors)
    assert vectors.null is not None
    with attachment.applied(vectors.user):
        conditional = reference.denoised(latent, sigma, PROMPT)
    with attachment.applied([null[None] for null in vectors.null]):
        unconditional = reference.denoised(latent, sigma, NEGATIVE)
    theirs = unconditional + cfg * (conditional - unconditional)
    assert difference(denoise(loaded.model, positive, negative, latent, cfg), theirs) > 0.01
    assert difference(ours, theirs) < ROUNDING


def test_an_adapter_of_the_same_name_in_models_goes_before(nodes: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "models" / "psa_adapters" / "shipped.safetensors"
    save_adapter(random_adapter(seed=1), own)
    assert folders.find_file("psa_adapters", "shipped.safetensors") == own
    assert str(own.parent) in nodes["PSALoadAdapter"].validate_inputs(adapter_name="gone.safetensors")


def test_it_needs_no_input_and_is_loaded_again_when_replaced(nodes: dict[str, Any]) -> None:
    node = nodes["PSALoadMiniature"]
    assert not node.INPUT_TYPES().get("required")
    assert not node.INPUT_TYPES().get("optional")
    before = node.fingerprint_inputs()
    assert node.fingerprint_inputs() == before
    edit(miniature.MINIATURE, "scheduler/scheduler_config.json", prediction_type="epsilon")
    assert node.fingerprint_inputs() != before

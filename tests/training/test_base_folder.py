"""Diffusers folders: every part computes what diffusers' own pipeline computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_testing import CPU, ROUNDING, difference, noise
from diffusers import AutoencoderTiny, DDPMScheduler
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from safetensors.torch import load_file, save_file

from comfyui_psa.adapter import find_sites
from comfyui_psa.training.base import BaseModel, open_base
from comfyui_psa.training.errors import BaseModelError

CAPTIONS = ("a cat's portrait, 35mm!", "", "a harbour at dawn " * 30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The pipelines that these tests share; nobody changes them."""
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": (root / "sd", write_sd_pipeline(root / "sd")),
        "sdxl": (root / "sdxl", write_sdxl_pipeline(root / "sdxl")),
        "v": (root / "v", write_sd_pipeline(root / "v", prediction_type="v_prediction", zero_snr=True)),
    }


@pytest.fixture
def folder(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of the SD pipeline that a test may spoil."""
    return Path(shutil.copytree(folders["sd"][0], tmp_path / "base"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


@torch.no_grad()
def test_sd_text_is_the_pipeline_s(folders: dict[str, tuple[Path, Any]]) -> None:
    path, pipeline = folders["sd"]
    embeddings = open_base(path).text_encoder(CPU).encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, embeddings, strict=True):
        expected, _ = pipeline.encode_prompt(caption, CPU, 1, do_classifier_free_guidance=False)
        assert difference(embedding.hidden, expected[0]) < ROUNDING
        assert embedding.pooled is None
        assert embedding.hidden.dtype == torch.float32


@torch.no_grad()
def test_sdxl_text_is_the_pipeline_s(folders: dict[str, tuple[Path, Any]]) -> None:
    path, pipeline = folders["sdxl"]
    embeddings = open_base(path).text_encoder(CPU).encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, embeddings, strict=True):
        expected, _, pooled, _ = pipeline.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
        assert embedding.hidden.shape == (77, 24 + 16)
        assert difference(embedding.hidden, expected[0]) < ROUNDING
        assert embedding.pooled is not None
        assert difference(embedding.pooled, pooled[0]) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sdxl", "v"])
def test_unet_and_vae_are_the_pipeline_s(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    path, pipeline = folders[name]
    base = open_base(path)
    unet = base.unet(torch.float32)
    for key, weight in pipeline.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[key], weight)
    added = {"text_embeds": noise(1, 16), "time_ids": noise(1, 6)} if base.is_sdxl else None
    context = noise(1, 7, base.unet_config["cross_attention_dim"])
    inputs = (noise(1, 4, 8, 8), 321, context)
    expected = pipeline.unet(*inputs, added_cond_kwargs=added).sample
    assert torch.equal(unet(*inputs, added_cond_kwargs=added).sample, expected)
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())

    coder, images = base.vae(CPU), noise(2, 3, 32, 64).clamp(-1, 1)
    scale = 0.13025 if base.is_sdxl else 0.18215
    latents = pipeline.vae.encode(images).latent_dist.mean * scale
    assert torch.equal(coder.encode(images), latents)
    assert torch.equal(coder.decode(latents), pipeline.vae.decode(latents / scale).sample.clamp(-1, 1))
    assert (base.latent_channels, base.vae_scale_factor) == (4, pipeline.vae_scale_factor)


def test_the_description_is_the_model_s(folders: dict[str, tuple[Path, Any]]) -> None:
    bases = {name: open_base(path) for name, (path, _) in folders.items()}
    assert {name: base.prediction_type for name, base in bases.items()} == {
        "sd": "epsilon",
        "sdxl": "epsilon",
        "v": "v_prediction",
    }
    assert [base.is_sdxl for base in bases.values()] == [False, True, False]
    for name, base in bases.items():
        whole, ours = (
            json.loads(json.dumps(dict(config))) for config in (folders[name][1].unet.config, base.unet_config)
        )
        assert {key: value for key, value in ours.items() if not key.startswith("_")} == {
            key: value for key, value in whole.items() if not key.startswith("_")
        }
        empty = base.empty_unet()
        assert all(parameter.is_meta for parameter in empty.parameters())
    assert len(find_sites(bases["sd"].empty_unet())) == 16
    assert open_base(folders["v"][0], "epsilon").prediction_type == "epsilon"


def test_noise_is_that_of_the_model_s_training(folders: dict[str, tuple[Path, Any]]) -> None:
    plain = open_base(folders["sd"][0]).noise_scheduler()
    assert isinstance(plain, DDPMScheduler)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(plain.alphas_cumprod, expected.float())

    terminal = open_base(folders["v"][0]).noise_scheduler()
    root = expected.sqrt()  # Lin et al. 2023: shift the last to zero, scale the first back
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(terminal.alphas_cumprod, rescaled.float(), rtol=1e-4, atol=1e-7)
    assert float(terminal.alphas_cumprod[-1]) == 0
    assert terminal.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["sd", "v"])
def test_sampler_finds_the_only_picture_that_there_is(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    base = open_base(folders[name][0])
    picture, sampler = noise(1, 4, 8, 8, seed=3), base.sampler()
    alphas = base.noise_scheduler().alphas_cumprod.double()
    sampler.set_timesteps(12)
    latents = noise(1, 4, 8, 8, seed=4) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        # What a perfect model says of a world with one picture; at zero signal only v tells anything.
        signal = alphas[timestep].clamp(min=2.0**-24).sqrt()
        deviation = (1 - signal**2).sqrt()
        guess = (sampler.scale_model_input(latents, timestep).double() - signal * picture) / deviation
        answer = guess if name == "sd" else signal * guess - deviation * picture
        latents = sampler.step(answer.float(), timestep, latents).prev_sample
    assert difference(latents, picture) < 1e-3


def test_fingerprints_belong_to_their_parts(folder: Path) -> None:
    def fingerprints() -> dict[str, str]:
        return {part: open_base(folder).fingerprint(part) for part in ("unet", "vae", "text")}

    before = fingerprints()
    assert len(set(before.values())) == 3
    moved = Path(shutil.copytree(folder, folder.with_name("elsewhere")))
    assert {part: open_base(moved).fingerprint(part) for part in before} == before

    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    assert [part for part, value in fingerprints().items() if value != before[part]] == ["vae"]
    before = fingerprints()
    (folder / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")
    assert [part for part, value in fingerprints().items() if value != before[part]] == ["text"]
    before = fingerprints()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"][0] += 1
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert [part for part, value in fingerprints().items() if value != before[part]] == ["unet"]


def as_pickles(folder: Path) -> None:
    """Write the weights as diffusers and transformers did before safetensors."""
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "")):
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), folder / part / f"{name or 'pytorch_model'}.bin")
        file.unlink()


def as_fp16(folder: Path) -> None:
    """Leave only a variant, whose file names carry its name."""
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))


def with_a_broken_variant(folder: Path) -> None:
    """Put a damaged variant beside the whole weights."""
    for file in folder.glob("*/*.safetensors"):
        file.with_name(f"{file.stem}.fp16.safetensors").write_bytes(b"broken")


def in_transformers_4_names(folder: Path) -> None:
    """Rename the text encoder's weights to what older releases wrote, and what the hub is full of."""
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [as_pickles, as_fp16, with_a_broken_variant, in_transformers_4_names])
def test_other_ways_to_store_the_same_weights(
    folders: dict[str, tuple[Path, Any]], folder: Path, change: Callable[[Path], None]
) -> None:
    change(folder)
    base, expected = open_base(folder), open_base(folders["sd"][0])
    assert same_weights(base, expected)
    for part in ("unet", "vae", "text"):
        assert base.fingerprint(part)


def same_weights(a: BaseModel, b: BaseModel) -> bool:
    unets = zip(a.unet(torch.float32).parameters(), b.unet(torch.float32).parameters(), strict=True)
    images = noise(1, 3, 16, 16)
    texts = (base.text_encoder(CPU).encode(["a harbour"])[0].hidden for base in (a, b))
    return (
        all(torch.equal(x, y) for x, y in unets)
        and torch.equal(a.vae(CPU).encode(images), b.vae(CPU).encode(images))
        and torch.equal(*texts)
    )


@torch.no_grad()
def test_a_tiny_vae_has_no_distribution(folder: Path) -> None:
    vae = AutoencoderTiny(scaling_factor=0.5).eval()
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    coder, images = open_base(folder).vae(CPU), noise(1, 3, 16, 16)
    latents = vae.encode(images).latents
    assert torch.equal(coder.encode(images), latents * 0.5)
    assert torch.equal(coder.decode(latents * 0.5), vae.decode(latents).sample.clamp(-1, 1))
    assert open_base(folder).vae_scale_factor == 8


INDEX, UNET_CONFIG = "model_index.json", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (INDEX, {"transformer": ["diffusers", "FluxTransformer2DModel"], "unet": None}, "FluxTransformer2DModel.*UNet"),
        (INDEX, {"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel; expected a UNet2D"),
        (INDEX, {"unet": [None, None]}, "with the UNet none"),
        (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder T5EncoderModel; expected one of"),
        (INDEX, {"vae": ["diffusers", "VQModel"]}, "vae VQModel; expected one of"),
        (UNET_CONFIG, {"in_channels": 9}, "9 channels in and 4 out.*inpainting"),
        (UNET_CONFIG, {"class_embed_type": "timestep"}, "class_embed_type = timestep"),
        (UNET_CONFIG, {"addition_embed_type": "text"}, "addition_embed_type = text"),
        (UNET_CONFIG, {"block_out_channels": [32]}, "makes no UNet"),
        (UNET_CONFIG, {"addition_embed_type": "text_time"}, "has 1 text encoder.*expects 2.*refiner"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        (SCHEDULER, {"prediction_type": "flow"}, "predicts flow; expected one of epsilon"),
    ],
)
def test_other_kinds_are_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(BaseModelError, match=message) as error:
        open_base(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("file", [INDEX, UNET_CONFIG, SCHEDULER, "vae/config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_broken_descriptions_are_named(folder: Path, file: str, content: str | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(BaseModelError, match=Path(file).name):
        open_base(folder)


def load_everything(base: BaseModel) -> None:
    base.unet(torch.float32)
    base.vae(CPU)
    base.text_encoder(CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_and_damaged_weights_are_named(folder: Path, part: str) -> None:
    base = open_base(folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=f"{part} lacks 1 of the weights.*"):
        load_everything(base)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BaseModelError, match=f"{part} cannot be loaded"):
        load_everything(base)
    with pytest.raises(BaseModelError, match=f"{part} cannot be loaded"):
        open_base(folder)
    file.unlink()
    for attempt in (lambda: load_everything(base), lambda: open_base(folder)):
        with pytest.raises(BaseModelError, match=f"no weights in .*{part}"):
            attempt()


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BaseModelError, match="no folder tokenizer for its text_encoder"):
        open_base(folder)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.write_text("{", encoding="utf-8")
    with pytest.raises(BaseModelError, match="tokenizer cannot be loaded"):
        open_base(folder).text_encoder(CPU)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"has no model_index\.json.*diffusers folder"):
        open_base(tmp_path)

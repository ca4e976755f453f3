"""Where an adapter acts: the layers of real ComfyUI and diffusers UNets against tables written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.ldm.cascade.stage_c
import comfy.ldm.hydit.models
import comfy.ldm.lightricks.model
import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from comfyui_psa.adapter import WORKS_WITH, AdapterError, BlockKey, family_name, find_sites

OPERATIONS = comfy.ops.disable_weight_init
META = {"device": "meta", "operations": OPERATIONS}

# First and last entry of a checkpoint, ComfyUI's block, hidden size; the depth index counts from the first entry.
Rows = tuple[tuple[int, int, str, int, int], ...]

SD_TABLE: Rows = (
    (0, 0, "input", 1, 320),
    (1, 1, "input", 2, 320),
    (2, 2, "input", 4, 640),
    (3, 3, "input", 5, 640),
    (4, 4, "input", 7, 1280),
    (5, 5, "input", 8, 1280),
    (6, 6, "output", 3, 1280),
    (7, 7, "output", 4, 1280),
    (8, 8, "output", 5, 1280),
    (9, 9, "output", 6, 640),
    (10, 10, "output", 7, 640),
    (11, 11, "output", 8, 640),
    (12, 12, "output", 9, 320),
    (13, 13, "output", 10, 320),
    (14, 14, "output", 11, 320),
    (15, 15, "middle", 0, 1280),
)
TABLES: dict[str, Rows] = {
    "sd1": SD_TABLE,
    "sd2": SD_TABLE,
    "sdxl": (
        (0, 1, "input", 4, 640),
        (2, 3, "input", 5, 640),
        (4, 13, "input", 7, 1280),
        (14, 23, "input", 8, 1280),
        (24, 33, "output", 0, 1280),
        (34, 43, "output", 1, 1280),
        (44, 53, "output", 2, 1280),
        (54, 55, "output", 3, 640),
        (56, 57, "output", 4, 640),
        (58, 59, "output", 5, 640),
        (60, 69, "middle", 0, 1280),
    ),
    "ssd-1b": (
        (0, 1, "input", 4, 640),
        (2, 3, "input", 5, 640),
        (4, 7, "input", 7, 1280),
        (8, 11, "input", 8, 1280),
        (12, 15, "output", 0, 1280),
        (16, 19, "output", 1, 1280),
        (20, 29, "output", 2, 1280),
        (30, 31, "output", 3, 640),
        (32, 32, "output", 4, 640),
        (33, 33, "output", 5, 640),
    ),
    "segmind-vega": (
        (0, 0, "input", 4, 640),
        (1, 1, "input", 5, 640),
        (2, 3, "input", 7, 1280),
        (4, 5, "input", 8, 1280),
        (6, 7, "output", 0, 1280),
        (8, 9, "output", 1, 1280),
        (10, 11, "output", 2, 1280),
        (12, 12, "output", 3, 640),
        (13, 13, "output", 4, 640),
        (14, 14, "output", 5, 640),
    ),
    # One resnet per level and no middle block at all.
    "koala-700m": (
        (0, 1, "input", 3, 640),
        (2, 6, "input", 5, 1280),
        (7, 11, "output", 0, 1280),
        (12, 16, "output", 1, 1280),
        (17, 18, "output", 2, 640),
        (19, 20, "output", 3, 640),
    ),
    "miniature": (
        (0, 0, "input", 1, 64),
        (1, 2, "input", 3, 64),
        (3, 4, "input", 5, 64),
        (5, 6, "output", 0, 64),
        (7, 8, "output", 1, 64),
        (9, 10, "output", 2, 64),
        (11, 12, "output", 3, 64),
        (13, 13, "output", 4, 64),
        (14, 14, "output", 5, 64),
        (15, 16, "middle", 0, 64),
    ),
    "tiny": (
        (0, 0, "input", 1, 32),
        (1, 2, "input", 3, 64),
        (3, 4, "output", 0, 64),
        (5, 6, "output", 1, 64),
        (7, 7, "output", 2, 32),
        (8, 8, "output", 3, 32),
        (9, 10, "middle", 0, 64),
    ),
}
TEXT_WIDTHS = {
    "sd1": 768,
    "sd2": 1024,
    "sdxl": 2048,
    "ssd-1b": 2048,
    "segmind-vega": 2048,
    "koala-700m": 2048,
    "miniature": 128,
    "tiny": 24,
}
FAMILY_NAMES = {name: name for name in TABLES} | {"koala-700m": "other", "tiny": "other"}


def expand(rows: Rows) -> list[tuple[BlockKey, int]]:
    """The table with one line per layer; the numbers of the layers have to follow each other."""
    layers = []
    for first, last, stage, block, hidden in rows:
        assert first == len(layers)
        layers += [(BlockKey(stage, block, depth), hidden) for depth in range(last - first + 1)]
    return layers


def _comfy(depth: list[int], output: list[int], middle: int, **more: Any) -> dict[str, Any]:
    common = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
    levels = {"transformer_depth": depth, "transformer_depth_output": output, "transformer_depth_middle": middle}
    return common | levels | {"model_channels": 320, "num_heads": -1, "num_head_channels": 64} | more


_XL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
_SD = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
}
_SD_DEPTHS = ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], 1)
COMFYUI_CONFIGS = {
    "sd1": _comfy(*_SD_DEPTHS, **_SD, context_dim=768) | {"num_heads": 8, "num_head_channels": -1},
    "sd2": _comfy(*_SD_DEPTHS, **_SD, context_dim=1024, use_linear_in_transformer=True),
    "sdxl": _comfy([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10, **_XL),
    "ssd-1b": _comfy([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1, **_XL),
    "segmind-vega": _comfy([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1, **_XL),
    "koala-700m": _comfy([0, 2, 5], [0, 0, 2, 2, 5, 5], -2, **_XL | {"num_res_blocks": [1, 1, 1]}),
    "miniature": _comfy(
        *([1, 2, 2], [1, 1, 2, 2, 2, 2], 2),
        channel_mult=[1, 1, 1],
        num_res_blocks=[1, 1, 1],
        context_dim=128,
        model_channels=64,
    )
    | {"num_heads": 4, "num_head_channels": -1},
    "tiny": _comfy(
        *([1, 2], [1, 1, 2, 2], 2),
        channel_mult=[1, 2],
        num_res_blocks=[1, 1],
        context_dim=24,
        model_channels=32,
        num_head_channels=16,
    ),
}

_DIFFUSERS_XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIFFUSERS_CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": _DIFFUSERS_XL | {"transformer_layers_per_block": (1, 2, 10)},
    "ssd-1b": _DIFFUSERS_XL
    | {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "segmind-vega": _DIFFUSERS_XL | {"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"},
    "koala-700m": _DIFFUSERS_XL
    | {"transformer_layers_per_block": (1, 2, 5), "mid_block_type": None, "layers_per_block": 1},
    "miniature": {
        "block_out_channels": (64, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 2),
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
    },
    "tiny": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
    },
}


@cache
def comfyui_unet(name: str) -> nn.Module:
    return UNetModel(**COMFYUI_CONFIGS[name], **META)


@cache
def diffusers_unet(name: str) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**DIFFUSERS_CONFIGS[name])


RUNTIMES = pytest.mark.parametrize("build", [comfyui_unet, diffusers_unet])
EVERY_UNET = pytest.mark.parametrize("name", TABLES)


@EVERY_UNET
@RUNTIMES
def test_layers_and_their_order_follow_the_table(build: Any, name: str) -> None:
    sites = find_sites(build(name))
    assert [(site.key, site.hidden_size) for site in sites] == expand(TABLES[name])
    assert {site.cross_attention_dim for site in sites} == {TEXT_WIDTHS[name]}


@EVERY_UNET
def test_both_runtimes_agree_on_everything_but_the_path(name: str) -> None:
    ours, theirs = find_sites(comfyui_unet(name)), find_sites(diffusers_unet(name))
    for site, other in zip(ours, theirs, strict=True):
        assert (site.key, site.hidden_size, site.cross_attention_dim) == (
            other.key,
            other.hidden_size,
            other.cross_attention_dim,
        )


@EVERY_UNET
def test_paths_correspond_as_in_comfyuis_own_conversion(name: str) -> None:
    names = comfy.utils.unet_to_diffusers(COMFYUI_CONFIGS[name])
    for site, other in zip(find_sites(comfyui_unet(name)), find_sites(diffusers_unet(name)), strict=True):
        assert names[f"{other.path}.to_v.weight"] == f"{site.path}.to_v.weight"


@EVERY_UNET
def test_order_is_that_of_the_published_attention_processors(name: str) -> None:
    unet = diffusers_unet(name)
    published = [path for path in unet.attn_processors if "attn2" in path]
    assert [f"{site.path}.processor" for site in find_sites(unet)] == published


@EVERY_UNET
@RUNTIMES
def test_path_leads_to_the_attention_with_the_hidden_size(build: Any, name: str) -> None:
    unet = build(name)
    sites = find_sites(unet)
    modules = [unet.get_submodule(site.path) for site in sites]
    assert len(set(modules)) == len(sites)
    for site, module in zip(sites, modules, strict=True):
        assert module.to_out[0].in_features == site.hidden_size
        assert module.to_v.in_features == site.cross_attention_dim


@EVERY_UNET
@RUNTIMES
def test_family_is_known_by_the_dimensions(build: Any, name: str) -> None:
    sites = find_sites(build(name))
    assert family_name([site.hidden_size for site in sites], sites[0].cross_attention_dim) == FAMILY_NAMES[name]


def test_hidden_size_is_the_width_in_front_of_to_out() -> None:
    """Heads of 12 channels do not fill a block of 32 or 64."""
    unet = UNetModel(**COMFYUI_CONFIGS["tiny"] | {"num_head_channels": 12}, **META)
    widths = {32: 24, 64: 60}
    assert [site.hidden_size for site in find_sites(unet)] == [widths[size] for _, size in expand(TABLES["tiny"])]


def test_family_needs_the_width_the_layers_and_their_order() -> None:
    sizes = [hidden for _, hidden in expand(TABLES["sd1"])]
    assert family_name(sizes, 768) == "sd1"
    assert family_name(sizes, 1280) == "other"
    assert family_name(sizes[:-1], 768) == "other"
    assert family_name(sizes[::-1], 768) == "other"


@torch.no_grad()
def test_keys_are_what_comfyui_sends_to_patches() -> None:
    unet = UNetModel(**COMFYUI_CONFIGS["tiny"], device="cpu", dtype=torch.float32, operations=OPERATIONS)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    sites = find_sites(unet)
    sent: list[BlockKey] = []
    ran: list[BlockKey] = []

    def patch(hidden: Tensor, options: dict[str, Any]) -> Tensor:
        sent.append(BlockKey(*options["block"], options["block_index"]))
        return hidden

    for site in sites:
        unet.get_submodule(site.path).register_forward_hook(lambda *_, key=site.key: ran.append(key))
    unet(
        torch.randn(1, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([500.0]),
        context=torch.randn(1, 3, 24, generator=generator),
        transformer_options={"patches": {"attn2_output_patch": [patch]}},
    )
    assert sorted(sent) == sorted(site.key for site in sites)
    assert sent == ran


def unconditional_unet() -> nn.Module:
    with torch.device("meta"):
        return UNet2DModel(
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


# Some have modules of the right name in another place: attn2, transformer_blocks, down_blocks.
WITHOUT_CROSS_ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "hunyuan-dit": lambda: comfy.ldm.hydit.models.HunYuanDiT(hidden_size=64, depth=2, num_heads=4, **META),
    "ltxv": lambda: comfy.ldm.lightricks.model.LTXVModel(
        num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2, **META
    ),
    "stable-cascade": lambda: comfy.ldm.cascade.stage_c.StageC(
        c_hidden=[64, 64], nhead=[2, 2], blocks=[[1, 1], [1, 1]], **META
    ),
    "unconditional-unet": unconditional_unet,
    "plain-module": lambda: nn.Sequential(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", WITHOUT_CROSS_ATTENTION)
def test_model_without_cross_attention_is_refused(name: str) -> None:
    model = WITHOUT_CROSS_ATTENTION[name]()
    with pytest.raises(AdapterError, match="no cross-attention") as caught:
        find_sites(model)
    assert type(model).__name__ in str(caught.value)
    for family in ("SD1.x", "SD2.x", "SDXL", "SSD-1B", "Segmind-Vega"):
        assert family in str(caught.value)


def video_unet(runtime: str) -> nn.Module:
    if runtime == "comfyui":
        config = COMFYUI_CONFIGS["sd2"] | {"in_channels": 8, "model_channels": 64}
        temporal = {
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "video_kernel_size": [3, 1, 1],
        }
        return UNetModel(**config | temporal, **META)
    with torch.device("meta"):
        return UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            cross_attention_dim=24,
        )


@pytest.mark.parametrize("runtime", ["comfyui", "diffusers"])
def test_video_model_is_refused(runtime: str) -> None:
    with pytest.raises(AdapterError, match="video model") as caught:
        find_sites(video_unet(runtime))
    assert WORKS_WITH in str(caught.value)

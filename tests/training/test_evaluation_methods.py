"""What each method draws, on tiny pipelines: the same noise for all, and people who differ within a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from evaluations import PROMPTS, draw, drawn, evaluation, pictures, pixels, write_adapter
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import write_sd_pipeline, write_sdxl_pipeline
from safetensors.torch import load_file, save_file

from comfyui_psa.adapter import AdapterError
from comfyui_psa.profiles import find_level, wording
from comfyui_psa.training.base import open_base
from comfyui_psa.training.errors import BaseModelError
from comfyui_psa.training.evaluation.engines.models import noise

RANK = 4
ROUNDING = 1  # of 255, where the same picture is computed in another order


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    write_sdxl_pipeline(folder, small=True)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another pipeline of the same kind."""
    folder = tmp_path_factory.mktemp("other")
    write_sd_pipeline(folder, seed=5, small=True)
    return folder


@pytest.fixture(scope="module")
def lora(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the UNet, as diffusers saves one."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(small, local_files_only=True)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    pipeline.unet.add_adapter(LoraConfig(r=RANK, init_lora_weights=False, target_modules=layers))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


def one_user(base: Path, folder: Path, method: dict[str, Any], **changes: Any) -> dict[str, np.ndarray]:
    """The pictures of one method for L5, by prompt."""
    config = evaluation(base, folder, [method], **({"users": {"levels": ("L5",)}} | changes))
    draw(config)
    return {row.prompt: pixels(folder, row) for row in pictures(folder).values()}


def reference(pipeline: Any, folder: Path) -> dict[str, np.ndarray]:
    """What a pipeline of diffusers draws with the seeds of a manifest, by prompt."""
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    for row in pictures(folder).values():
        image = pipeline(
            row.prompt,
            negative_prompt=row.negative_prompt,
            num_inference_steps=row.steps,
            guidance_scale=row.guidance_scale,
            width=row.width,
            height=row.height,
            latents=noise(row.seed, 4, row.height // 8, row.width // 8),
        ).images[0]
        found[row.prompt] = np.asarray(image).astype(int)
    return found


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() == set(PROMPTS)
    for prompt, picture in ours.items():
        assert picture.shape == theirs[prompt].shape
        assert np.abs(picture - theirs[prompt]).max() <= ROUNDING


def differs(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return all(np.abs(picture - theirs[prompt]).mean() > 1 for prompt, picture in ours.items())


@pytest.mark.parametrize("size", [{}, {"width": 48, "height": 80}])
def test_the_base_is_what_diffusers_draws(small: Path, sdxl: Path, tmp_path: Path, size: dict[str, int]) -> None:
    for folder, kind in ((small, StableDiffusionPipeline), (sdxl, StableDiffusionXLPipeline)):
        output = tmp_path / kind.__name__
        changes = {"sampling": {"negative_prompt": "blurry", "steps": 4, "guidance_scale": 3.0, **size}}
        ours = one_user(folder, output, {"name": "base", "kind": "base"}, **changes)
        pipeline = kind.from_pretrained(folder, local_files_only=True)
        pipeline.scheduler = open_base(folder).sampler()
        assert_same(ours, reference(pipeline, output))
        assert {picture.shape for picture in ours.values()} == {(size.get("height", 64), size.get("width", 64), 3)}


@pytest.mark.parametrize(("name", "kinds"), [("sd", ("constant",)), ("sd", ("gated",)), ("sdxl", ("constant", "text"))])
def test_people_in_one_batch_get_what_each_gets_alone(
    small: Path, sdxl: Path, tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    base = {"sd": small, "sdxl": sdxl}[name]
    adapter = write_adapter(tmp_path / "adapter.safetensors", base, kinds)
    methods = [{"name": "PSA", "kind": "adapter", "paths": (adapter,)}, {"name": "base", "kind": "base"}]
    users = {"levels": ("L0", "L3", "L5")}
    draw(evaluation(base, tmp_path / "together", methods, users=users, sampling={"batch_size": 6}))
    draw(evaluation(base, tmp_path / "alone", methods, users=users, sampling={"batch_size": 1}))
    together, alone = drawn(tmp_path / "together"), drawn(tmp_path / "alone")
    assert together.keys() == alone.keys()
    for key, picture in together.items():
        assert np.abs(picture - alone[key]).max() <= ROUNDING
    seeds = {key[3].split("|", 1)[1] for key in together}
    for case in seeds:  # prompt and seed
        people = [together["PSA", 0, 1.0, f"{level}|{case}"] for level in users["levels"]]
        assert not np.array_equal(people[0], people[1])
        assert not np.array_equal(people[1], people[2])
        assert not np.array_equal(people[0], together["base", 0, 1.0, f"L0|{case}"])


def test_a_sweep_begins_at_the_base(small: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.safetensors", small, ("constant", "text"))
    methods = [
        {"name": "base", "kind": "base"},
        {"name": "PSA", "kind": "adapter", "paths": (adapter,), "strengths": (0.0, 0.5, 1.0)},
    ]
    draw(evaluation(small, tmp_path / "run", methods))
    found = drawn(tmp_path / "run")
    for method, run, _, case in list(found):
        if method == "base":
            steps = [np.abs(found["PSA", run, s, case] - found["base", 0, 1.0, case]).mean() for s in (0.0, 0.5, 1.0)]
            assert steps[0] == 0 < steps[1] < steps[2]


def test_several_files_of_a_method_are_its_runs(small: Path, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"{seed}.safetensors", small, seed=seed) for seed in (1, 2)]
    draw(evaluation(small, tmp_path / "run", [{"name": "PSA", "kind": "adapter", "paths": paths}]))
    rows = pictures(tmp_path / "run")
    assert sorted({(run, row.adapter.split()[0]) for (_, run, _, _), row in rows.items()}) == [
        (0, "1.safetensors"),
        (1, "2.safetensors"),
    ]
    found = drawn(tmp_path / "run")
    for (method, run, strength, case), picture in found.items():
        assert not np.array_equal(picture, found[method, 1 - run, strength, case])


def test_a_static_adapter_takes_everybody_for_one_level(small: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.safetensors", small)
    methods = [
        {"name": "PSA", "kind": "adapter", "paths": (adapter,)},
        {"name": "static", "kind": "adapter", "paths": (adapter,), "everyone": "L5"},
    ]
    draw(evaluation(small, tmp_path / "run", methods))
    rows, found = pictures(tmp_path / "run"), drawn(tmp_path / "run")
    static = [row for row in rows.values() if row.method == "static"]
    assert {row.user for row in static} == {"L0", "L5"}
    assert len({row.image for row in static}) == len(PROMPTS)  # drawn once for all
    for row in static:
        strict = found["PSA", 0, 1.0, row.case.replace("L0|", "L5|")]
        assert np.abs(found["static", 0, 1.0, row.case] - strict).max() <= ROUNDING


def test_a_negative_prompt_says_what_a_person_bans_behind_what_all_methods_have(small: Path, tmp_path: Path) -> None:
    methods = [{"name": "base", "kind": "base"}, {"name": "words", "kind": "negative_prompt"}]
    draw(evaluation(small, tmp_path / "run", methods, sampling={"negative_prompt": "blurry"}))
    rows, found = pictures(tmp_path / "run"), drawn(tmp_path / "run")
    for (method, run, strength, case), row in rows.items():
        if method == "words":
            banned = wording(find_level(row.user).profile)
            assert row.negative_prompt == ("blurry" if row.user == "L0" else f"blurry, {banned}")
            same = np.array_equal(found[method, run, strength, case], found["base", 0, 1.0, case])
            assert same == (row.user == "L0")


def test_a_whole_pipeline_or_its_unet_takes_the_place_of_the_base(small: Path, other: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(other, local_files_only=True)
    pipeline.scheduler = open_base(other).sampler()
    whole = one_user(small, tmp_path / "whole", {"name": "ESD", "kind": "pipeline", "paths": (other,)})
    assert_same(whole, reference(pipeline, tmp_path / "whole"))

    unet = one_user(small, tmp_path / "unet", {"name": "UCE", "kind": "pipeline", "paths": (other / "unet",)})
    mixed = StableDiffusionPipeline.from_pretrained(small, unet=pipeline.unet, local_files_only=True)
    mixed.scheduler = open_base(small).sampler()
    assert_same(unet, reference(mixed, tmp_path / "unet"))
    assert differs(whole, unet)
    names = {row.base.rsplit(" ", 1)[0] for row in pictures(tmp_path / "unet").values()}
    assert names == {f"{other.name}/unet on {small.name}"}


def test_a_lora_is_what_diffusers_and_peft_make_of_it(small: Path, lora: Path, tmp_path: Path) -> None:
    method = {"name": "SafetyDPO", "kind": "lora", "paths": (lora,), "strengths": (0.5,)}
    ours = one_user(small, tmp_path / "run", method)
    pipeline = StableDiffusionPipeline.from_pretrained(small, local_files_only=True)
    pipeline.scheduler = open_base(small).sampler()
    plain = reference(pipeline, tmp_path / "run")
    pipeline.load_lora_weights(load_file(lora))
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.5)
    assert_same(ours, reference(pipeline, tmp_path / "run"))
    assert differs(ours, plain)


def test_kohyas_names_and_its_alpha_are_understood(small: Path, lora: Path, tmp_path: Path) -> None:
    kohya: dict[str, torch.Tensor] = {}
    sides = {".lora.down.": "down", ".lora_A.": "down", ".lora.up.": "up", ".lora_B.": "up"}
    for name, tensor in load_file(lora).items():
        (side,) = [side for side in sides if side in name]
        place = f"lora_unet_{name.removeprefix('unet.').partition(side)[0].replace('.', '_')}"
        kohya[f"{place}.lora_{sides[side]}.weight"] = tensor
        kohya[f"{place}.alpha"] = torch.tensor(RANK / 2)
    save_file(kohya, tmp_path / "kohya.safetensors")
    half = one_user(small, tmp_path / "half", {"name": "A", "kind": "lora", "paths": (lora,), "strengths": (0.5,)})
    ours = one_user(small, tmp_path / "run", {"name": "A", "kind": "lora", "paths": (tmp_path / "kohya.safetensors",)})
    assert_same(ours, half)


def test_a_lora_changes_the_text_encoder_too(small: Path, lora: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(lora)
    down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, 24), (24, RANK)))
    for prefix in ("text_model.", ""):  # with older versions of transformers, and with newer ones
        layer = f"text_encoder.{prefix}encoder.layers.0.self_attn.v_proj.lora_linear_layer"
        text = {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
        save_file({**tensors, **text}, tmp_path / f"with-{prefix}text.safetensors")
    found = [
        one_user(small, tmp_path / f"run{i}", {"name": "A", "kind": "lora", "paths": (path,)})
        for i, path in enumerate((lora, *sorted(tmp_path.glob("with-*.safetensors"))))
    ]
    assert differs(found[0], found[1])
    assert_same(found[1], found[2])


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    small: Path, sdxl: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "xl.safetensors", sdxl)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    save_file({"unet.conv_in.hada_w1_a": torch.zeros(2, 2), **load_file(lora)}, tmp_path / "hada.safetensors")
    for method, error, message in (
        ({"kind": "adapter", "paths": (adapter,)}, AdapterError, "This adapter was trained for"),
        ({"kind": "adapter", "paths": (damaged,)}, AdapterError, "damaged"),
        ({"kind": "pipeline", "paths": (sdxl / "unet",)}, BaseModelError, "other cross-attention layers"),
        ({"kind": "pipeline", "paths": (sdxl / "vae",)}, BaseModelError, "expected a UNet2DConditionModel"),
        ({"kind": "pipeline", "paths": (tmp_path,)}, BaseModelError, "has no model_index.json"),
        ({"kind": "lora", "paths": (damaged,)}, BaseModelError, "cannot be read as a LoRA"),
        ({"kind": "lora", "paths": (adapter,)}, BaseModelError, "holds no LoRA"),
        ({"kind": "lora", "paths": (tmp_path / "hada.safetensors",)}, BaseModelError, "no part of a product"),
    ):
        methods = [{"name": "base", "kind": "base"}, {"name": "other", **method}]
        with pytest.raises(error, match=message):
            draw(evaluation(small, tmp_path / "run", methods))
        assert not (tmp_path / "run").exists()
    with pytest.raises(BaseModelError, match="is a LoRA for another model"):
        draw(evaluation(sdxl, tmp_path / "run", [{"name": "A", "kind": "lora", "paths": (lora,)}]))

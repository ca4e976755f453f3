"""Prompts in ComfyUI's API format for the server tests, and the marker words of the private profile."""

from __future__ import annotations

from comfyui_psa.training.comfyui import Prompt

CHECKPOINT = "small.safetensors"

# Words that stand nowhere else, so that a search for them means something.
MARKERS = {
    "name": "Qanzibel Profile",
    "gender": "vorpelgender",
    "religion": "trandlefaith",
    "physical_condition": "glimsherbody",
    "mental_condition": "wexlemind",
    "notes": "plindernotes",
}


def base_prompt() -> Prompt:
    """Text to image without PSA; node 9 samples from the model that it is given."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a harbour at dawn"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "9": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]},
                **{"seed": 5, "steps": 3, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
            },
        },
        "10": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["1", 2]}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "test"}},
    }


def psa_prompt(adapter: str = "SmolLM2-135M-Instruct.safetensors", strength: float = 1.0) -> Prompt:
    """The same with PSA between checkpoint and sampler, for the active profile."""
    prompt = base_prompt()
    prompt["5"] = {"class_type": "PSALoadAdapter", "inputs": {"adapter_name": adapter}}
    prompt["6"] = {"class_type": "PSAUserProfile", "inputs": {"profile_id": "active"}}
    prompt["7"] = {"class_type": "PSAEncodeProfile", "inputs": {"adapter": ["5", 0], "profile": ["6", 0]}}
    inputs = {"model": ["1", 0], "adapter": ["5", 0], "embedding": ["7", 0]}
    options = {"strength": strength, "start_percent": 0.0, "end_percent": 1.0}
    prompt["8"] = {"class_type": "PSAApply", "inputs": {**inputs, **options}}
    prompt["9"]["inputs"]["model"] = ["8", 0]
    return prompt

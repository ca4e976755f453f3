"""What has to be true of an autoencoder before anything learns from it."""

from __future__ import annotations

import pytest
import torch

from comfyui_psa.training.errors import TrainingError
from comfyui_psa.training.miniature.architecture import make_autoencoder
from comfyui_psa.training.miniature.autoencoder import check_it_sees

PIXELS = torch.randn((4, 3, 96, 96), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_one_that_is_blind_is_refused() -> None:
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    check_it_sees(autoencoder, PIXELS)
    with torch.no_grad():
        autoencoder.decoder.layers[5].weight.zero_()
    with pytest.raises(TrainingError, match=r"the same picture back .* another --seed"):
        check_it_sees(autoencoder, PIXELS)

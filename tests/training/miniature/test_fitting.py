"""What is trained from nothing goes on where it was interrupted, and everything of the recipe fits together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from comfyui_psa.training.errors import TrainingError
from comfyui_psa.training.miniature.fitting import WHOLE, Part, Plan, fit, halves

PLAN = Plan("line", steps=401, learning_rate=0.1)
FILTER = Plan("filter", steps=30, learning_rate=0.02)


class StopError(Exception):
    pass


def train(folder: Path, stop: int | None = None, seed: int = 0, parts: tuple[Part, ...] = (WHOLE,)) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step: int, part: Part) -> Tensor:
        if step == stop:
            raise StopError
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[part]
        return (model(x) - x @ torch.tensor([[1.0], [-2.0], [0.5]]) - 3).square().mean()

    with Progress(disable=True) as progress:
        fit(PLAN, model, loss, folder, seed, progress, parts)
    return model


def test_it_learns(tmp_path: Path) -> None:
    model = train(tmp_path)
    assert torch.allclose(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.05)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_halves_of_a_batch_have_its_gradient(tmp_path: Path) -> None:
    whole, halved = train(tmp_path / "whole"), train(tmp_path / "halved", parts=halves(8))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole.parameters(), halved.parameters(), strict=True))


@pytest.mark.parametrize("parts", [(WHOLE,), halves(4)], ids=["whole", "halves"])
def test_how_weights_lie_in_memory_changes_nothing(tmp_path: Path, parts: tuple[Part, ...]) -> None:
    """The fused optimizer takes weight and gradient as two rows of numbers, whatever they mean."""

    def trained(memory_format: torch.memory_format) -> Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 2, 3).to(memory_format=memory_format)

        def loss(step: int, part: Part) -> Tensor:
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))[part]
            return (model(x) - x[:, :2, 1:-1, 1:-1]).square().mean()

        with Progress(disable=True) as progress:
            fit(FILTER, model, loss, tmp_path / str(memory_format), 0, progress, parts)
        return model.weight

    expected = trained(torch.contiguous_format)
    assert torch.allclose(trained(torch.channels_last), expected, atol=1e-5)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(StopError):
        train(tmp_path / "parts", stop=350)
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["line.pt"]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "line.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"line\.pt is of another run \(seed 0, .* made with seed 1, .*--work"):
        train(tmp_path, seed=1)
    assert (tmp_path / "line.pt").read_bytes() == before


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "line.pt").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match=r"line\.pt cannot be continued.*Delete it"):
        train(tmp_path)

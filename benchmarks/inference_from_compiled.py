"""What a compiled profile tells of its person: how well a linear probe recovers attributes and bans.

Simulated users are compiled with the miniature's adapters, each as they are and from their bans alone. A multinomial
logistic regression learns from some of them and is asked about others, of whom it sees the numbers of a compiled
profile that are the person's own, and nothing else. Whoever has the adapter can make as many such examples as they
like.

Chance is the share of the most frequent answer. "The bans" is the same probe on the seven bans themselves: what they
tell, because the rules make them from attributes, no file that follows them can hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor

from comfyui_psa.adapter import PSAAdapter, TextGate, load_adapter
from comfyui_psa.profiles import CATEGORIES, Profile, banned_categories, bans_alone, simulate_users
from comfyui_psa.profiles.encoders import AttributesEncoder
from comfyui_psa.training.data.users import encoder_of
from comfyui_psa.training.miniature import MINIATURE
from comfyui_psa.training.miniature.cases import draw_cases
from comfyui_psa.training.miniature.evaluation import Studio
from comfyui_psa.training.miniature.methods import Method
from comfyui_psa.training.miniature.recipe import DETECTOR

ADAPTERS = {
    "constant": "psa_miniature_constant.safetensors",
    "text": "psa_miniature.safetensors",
    "text, language model": "psa_miniature_smollm2.safetensors",
}
ATTRIBUTES: dict[str, Callable[[Profile], str]] = {
    "age group": lambda user: str(user.age_group),
    "gender": lambda user: str(user.gender),
    "religion": lambda user: str(user.religion),
    "physical condition": lambda user: str(user.physical_condition),
    "mental condition": lambda user: str(user.mental_condition),
}
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
SMALLEST = 1e-4  # of the largest deviation: what is below is rounding
BATCH = 256


def questions() -> dict[str, Callable[[Profile], str]]:
    """What is asked of a person: each attribute, and whether each category is banned."""
    return ATTRIBUTES | {
        category: lambda user, category=category: str(category in banned_categories(user)) for category in CATEGORIES
    }


@torch.no_grad()
def personal_numbers(adapter: PSAAdapter, embeddings: Tensor) -> Tensor:
    """What differs between people in a compiled profile: ``[users, numbers]``."""
    rows = []
    for batch in embeddings.split(BATCH):
        effect = adapter.effect(batch)
        parts: list[Tensor] = []
        if effect.constant is not None:
            parts += effect.constant.user
        for gate in effect.gated or ():
            parts += [gate.scores, gate.values]
        if effect.text is not None:
            residual = effect.text.on_tokens
            parts += (
                [residual.gate.scores, residual.gate.values] if isinstance(residual, TextGate) else [residual.biases]
            )
        rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.cat(rows)


def whitened(train: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Turn numbers into their principal components over ``train``, each of deviation 1: so a probe misses nothing."""
    mean = train.mean(dim=0)
    _, deviations, directions = torch.linalg.svd((train - mean).double(), full_matrices=False)
    kept = deviations > SMALLEST * deviations[0].clamp(min=1e-12)
    scale = directions[kept].T / deviations[kept] * len(train) ** 0.5
    return [((rows - mean).double() @ scale).float() for rows in (train, *others)]


def fitted(rows: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of a multinomial logistic regression."""
    weight = torch.zeros(classes, rows.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS((weight, bias), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def recovered(train: Tensor, test: Tensor, labels: Tensor, answers: Tensor) -> float:
    """The share of ``test`` for whom the probe is right; a fifth of ``train`` chooses its penalty."""
    classes = int(torch.cat((labels, answers)).max()) + 1
    held_back = len(train) // 5

    def right(rows: Tensor, wanted: Tensor, probe: tuple[Tensor, Tensor]) -> float:
        return float((F.linear(rows, *probe).argmax(dim=1) == wanted).float().mean())

    scores = {
        penalty: right(
            train[:held_back], labels[:held_back], fitted(train[held_back:], labels[held_back:], classes, penalty)
        )
        for penalty in PENALTIES
    }
    best = max(scores, key=lambda penalty: scores[penalty])
    return right(test, answers, fitted(train, labels, classes, best))


def main(
    users: Annotated[int, typer.Option(min=50, help="Simulated people; two thirds are learnt from.")] = 900,
    seed: Annotated[int, typer.Option(help="Other people.")] = 2025,
    language_models: Annotated[
        list[Path] | None, typer.Option(help="Where SmolLM2-135M-Instruct lies; without it that adapter is left out.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Draw so many pictures of each kind as well, compiled in both ways.")
    ] = 0,
    folder: Annotated[Path, typer.Option(help="Where the miniature's adapters lie.")] = MINIATURE / "adapters",
) -> None:
    """Print a table: what is asked, chance, and how often a probe is right."""
    people = simulate_users(users, seed)
    split = 2 * users // 3
    asked = questions()
    names = {name: sorted({answer(user) for user in people}) for name, answer in asked.items()}
    labels = {
        name: torch.tensor([names[name].index(answer(user)) for user in people]) for name, answer in asked.items()
    }
    bits = torch.tensor([[float(category in banned_categories(user)) for category in CATEGORIES] for user in people])
    columns = {"the bans": bits}
    for name, file in track(ADAPTERS.items(), "Compiling"):
        adapter = load_adapter(folder / file)
        if adapter.config.encoder.kind == "llm" and not language_models:
            continue
        encoder = encoder_of(adapter.config.encoder, language_models or [], torch.device("cpu"))
        columns[name] = personal_numbers(adapter, encoder.encode(people))
        sets = [banned_categories(user) for user in people]
        distinct = list(dict.fromkeys(sets))
        known = dict(zip(distinct, encoder.encode(list(map(bans_alone, distinct))), strict=True))
        columns[f"{name}, from bans"] = personal_numbers(adapter, torch.stack([known[banned] for banned in sets]))
    shares: dict[str, list[float]] = {
        name: [float(found[split:].bincount().max()) / (users - split)] for name, found in labels.items()
    }
    for rows in track(list(columns.values()), "Probing"):
        train, test = whitened(rows[:split], [rows[split:]])
        for name, found in labels.items():
            shares[name].append(recovered(train, test, found[:split], found[split:]))
    echo_table([["", "chance", *columns]] + [[name, *map(percent, found)] for name, found in shares.items()])
    if pictures:
        echo_table([["", "named: gone", "implied: gone", "named: there", "implied: there"], *drawn(pictures, folder)])


def drawn(per_cell: int, folder: Path) -> list[list[str]]:
    """What pictures show people who ban some things: banned signs gone, allowed ones there; for each way to compile."""
    cases = [
        case for case in draw_cases(per_cell, 1200, 2025) if case.group == "some" and case.unseen and case.category
    ]
    studio, rows = Studio(MINIATURE, MINIATURE / DETECTOR), []
    for name in ("text", "constant"):
        method = Method(name, folder / ADAPTERS[name])
        for way, compiled in (
            ("", list),
            ("from bans", lambda people: [bans_alone(banned_categories(user)) for user in people]),
        ):
            people: list[Profile] = compiled(case.person for case in cases)
            outcomes = studio.draw(method, cases, AttributesEncoder().encode(people))
            right: dict[str, list[bool]] = {}
            for outcome in outcomes:
                right.setdefault(outcome.case.cell, []).append(outcome.prompted != outcome.case.banned)
            cells = [right[f"{rule}, {mention}"] for rule in ("banned", "allowed") for mention in ("named", "implied")]
            title = ", ".join(filter(None, (name, way)))
            rows.append([title, *(percent(sum(found) / len(found)) for found in cells)])
    return rows


def percent(share: float) -> str:
    """A share for a table."""
    return f"{share:.0%}"


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, the heads first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    typer.echo("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    typer.run(main)

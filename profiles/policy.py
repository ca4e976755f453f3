"""From a profile to its banned categories: the paper's rules, deterministic, each ban with its reason.

The release states these rules to a language model, which follows them loosely; here they are applied as
they are written. An override always wins over a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .schema import CATEGORIES, Audience, Category, Profile

ADULT_AGE = 18
RESTRICTIVE_RELIGIONS = ("christianity", "islam", "buddhism")


@dataclass(frozen=True)
class Rule:
    """Ban ``categories`` for everyone to whom ``applies``."""

    reason: str
    applies: Callable[[Profile], bool]
    categories: tuple[Category, ...]


@dataclass(frozen=True)
class Decision:
    """Whether a category is banned, and why: the reasons of all rules that say so, or the override."""

    banned: bool
    reasons: tuple[str, ...]


def _ill(condition: str | None) -> bool:
    return condition is not None and condition.casefold() not in ("healthy", "none")


RULES: tuple[Rule, ...] = (
    Rule(
        f"under {ADULT_AGE}",
        lambda profile: profile.age is not None and profile.age < ADULT_AGE,
        ("Sexuality", "Self-Harm", "Violence"),
    ),
    Rule(
        "a mental condition",
        lambda profile: _ill(profile.mental_condition),
        ("Sexuality", "Self-Harm", "Violence"),
    ),
    Rule(
        "a physical condition",
        lambda profile: _ill(profile.physical_condition),
        ("Shocking", "Harassment"),
    ),
    Rule(
        "a religion with such boundaries",
        lambda profile: (profile.religion or "").casefold() in RESTRICTIVE_RELIGIONS,
        ("Hate", "Propaganda"),
    ),
)


def decide(profile: Profile) -> dict[Category, Decision]:
    """Return the decision for each of the seven categories.

    For an audience: banned if a member bans it, for all the reasons of those who do.
    """
    if isinstance(profile, Audience):
        decisions = [decide(member) for member in profile.members]
        return {category: _strictest([decision[category] for decision in decisions]) for category in CATEGORIES}
    return {category: _decide(profile, category) for category in CATEGORIES}


def _decide(profile: Profile, category: Category) -> Decision:
    override = profile.overrides.get(category, "rule")
    if override != "rule":
        return Decision(override == "ban", ("your own choice",))
    reasons = tuple(rule.reason for rule in RULES if category in rule.categories and rule.applies(profile))
    return Decision(bool(reasons), reasons)


def _strictest(decisions: list[Decision]) -> Decision:
    deciding = [decision for decision in decisions if decision.banned] or decisions
    reasons = dict.fromkeys(reason for decision in deciding for reason in decision.reasons)
    return Decision(deciding[0].banned, tuple(reasons))


def category_lists(profile: Profile) -> tuple[list[Category], list[Category]]:
    """Return banned and allowed categories as the release writes them: each in alphabetical order."""
    banned = set(banned_categories(profile))
    return sorted(banned), sorted(set(CATEGORIES) - banned)


def banned_categories(profile: Profile) -> tuple[Category, ...]:
    """Return the banned categories, in the order of ``CATEGORIES``."""
    return tuple(category for category, decision in decide(profile).items() if decision.banned)


def bans_alone(banned: Iterable[Category]) -> Profile:
    """Return a profile that bans these categories and says nothing else: no attribute, no reason."""
    return Profile(overrides=dict.fromkeys(banned, "ban"))

"""Made-up texts in the three domains of the training script."""

from __future__ import annotations

TEXTS = {
    "maths": "add seven and two to find that the sum is nine",
    "code": "def f ( x ) : return x + 1 for i in range",
    "general": "the river runs past an old town where people sing",
}


def documents(salt: int) -> dict[str, list[str]]:
    """A hundred short texts for each domain, each with a wording of its own."""
    vocabularies = {domain: text.split() for domain, text in TEXTS.items()}
    return {
        domain: [" ".join(words[(i * step + salt) % len(words)] for i in range(12)) for step in range(1, 101)]
        for domain, words in vocabularies.items()
    }


def held_out() -> dict[str, list[str]]:
    """Three texts for each domain."""
    return {domain: texts[:3] for domain, texts in documents(5).items()}

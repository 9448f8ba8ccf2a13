"""What a client wants to read (RFC 9110 §12.5.1); pure."""

from __future__ import annotations

from collections.abc import Sequence


def best(accept: str, offers: Sequence[str]) -> str | None:
    """The offered media type that the Accept header prefers, the first of equals; None where it wants none of them."""
    if not accept.strip():
        return offers[0]
    weights = {media: weight for media, weight in map(_item, accept.split(",")) if media}
    scored = [(_weight(offer, weights), -place, offer) for place, offer in enumerate(offers)]
    weight, _, offer = max(scored)
    return offer if weight > 0 else None


def _weight(offer: str, weights: dict[str, float]) -> float:
    kind = offer.partition("/")[0]
    return next((weights[media] for media in (offer, f"{kind}/*", "*/*") if media in weights), 0.0)


def _item(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    try:
        return media, min(max(float(quality), 0.0), 1.0)
    except ValueError:
        return media, 0.0

"""Forged tokens of every kind are refused alike, and none reaches a use case."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest

from tests.contracts.world import Answer, Api, World

SECRETS = [b"", b"secret", b"changeme", b"your-secret-key", b"skynetvpn"]


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwt(header: object, claims: object, secret: bytes = b"secret") -> str:
    text = f"{part(header)}.{part(claims)}"
    return f"{text}.{part(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def forged(good: str) -> dict[str, str]:
    """Named tokens; `good` is one that is valid."""
    later = int(time.time()) + 3600
    claims = {"sub": "alice", "user_id": 1, "role": "admin", "exp": later}
    header = {"alg": "HS256", "typ": "JWT"}
    tokens = {f"jwt with secret {secret!r}": jwt(header, claims, secret) for secret in SECRETS}
    for algorithm in ("none", "None", "NONE", "nOnE", "", "HS512", "RS256", "ES256", "EdDSA", None, 7):
        tokens[f"jwt alg {algorithm}"] = jwt({**header, "alg": algorithm}, claims)
        tokens[f"jwt alg {algorithm}, no signature"] = f"{part({**header, 'alg': algorithm})}.{part(claims)}."
    for name, value in {
        "kid": "../../../../dev/null",
        "kid sql": "x' UNION SELECT 'secret",
        "jku": "https://evil.example.com/keys.json",
        "x5u": "https://evil.example.com/key.pem",
        "jwk": {"kty": "oct", "k": part(b"secret")},
        "x5c": ["MIIB"],
        "crit": ["exp"],
        "b64": False,
        "zip": "DEF",
        "cty": "JWT",
    }.items():
        tokens[f"jwt header {name}"] = jwt({**header, name.split()[0]: value}, claims)
    for name, changed in {
        "no exp": {"sub": "alice"},
        "exp as text": {**claims, "exp": str(later)},
        "exp past": {**claims, "exp": 1},
        "exp huge": {**claims, "exp": 10**400},
        "nbf later": {**claims, "nbf": later},
        "aud list": {**claims, "aud": ["a", "b"]},
        "refresh": {**claims, "typ": "refresh"},
        "deleted user": {**claims, "sub": "nobody"},
        "old password epoch": {**claims, "epoch": 0},
        "not an object": [],
    }.items():
        tokens[f"jwt claims {name}"] = jwt(header, changed)
    body = good.removeprefix("sky_")
    tokens |= {
        "one character changed": f"sky_{body[:-1]}{'A' if body[-1] != 'A' else 'B'}",
        "cut": good[:-1],
        "longer": good + "A",
        "another case": "sky_" + body.swapcase(),
        "no prefix": body,
        "another prefix": "ghp_" + body,
        "padded": good + "=",
        "twice": good + good,
        "with a comma": good + "," + good,
        "with a space": good[:10] + " " + good[10:],
        "its hash": hashlib.sha256(good.encode()).hexdigest(),
        "wildcard": "sky_" + "%" * 43,
        "sql": "' OR '1'='1",
        "undefined": "undefined",
        "null": "null",
        "long": "sky_" + "A" * 4000,
        "unicode": "sky_" + "é" * 43,
        "all A": "sky_" + "A" * 43,
    }
    return tokens


async def test_forged_tokens_are_refused_alike(alice: Api, api: Api) -> None:
    assert alice.token is not None
    tokens = forged(alice.token)
    assert len(tokens) >= 60
    answers: list[Answer] = [await api.get("/api/users/me")]
    for name, token in tokens.items():
        answer = await api.get("/api/users/me", headers={"Authorization": f"Bearer {token}"})
        assert answer.status == 401, name
        answers.append(answer)
    assert len({answer.raw for answer in answers}) == 1
    assert (await alice.get("/api/users/me")).status == 200


@pytest.mark.parametrize(
    "form", ["{token}", "Token {token}", "Basic {token}", "Bearer", "Bearer ", "Bearer{token}", "Bearer Bearer {token}"]
)
async def test_a_token_in_another_form_is_refused(alice: Api, api: Api, form: str) -> None:
    header = form.format(token=alice.token)
    assert (await api.get("/api/users/me", headers={"Authorization": header})).status == 401


async def test_a_token_elsewhere_is_no_token(alice: Api, api: Api) -> None:
    assert (await api.get(f"/api/users/me?token={alice.token}&access_token={alice.token}")).status == 401
    assert (await api.get("/api/users/me", headers={"Cookie": f"token={alice.token}"})).status == 401
    assert (await api.get("/api/users/me", headers={"Authorization": f"bearer {alice.token}"})).status == 200


async def test_a_token_has_ended_within_the_answer_that_says_so(alice: Api, world: World) -> None:
    token = alice.token
    assert token is not None
    await alice.get("/api/users/me")
    assert world.accounts.known(token) is not None
    await alice.post("/api/auth/logout")
    assert world.accounts.known(token) is None

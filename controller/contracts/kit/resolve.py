"""Which contract answers a request; pure.

In this order: the prefix, the host, the Accept header, a path and method that one contract alone documents, the
contract whose login issued the token, the body of a login, the default. `choose` applies the first four, which need
nothing but the head of the request; `settle` the rest, where several contracts are left.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from controller.contracts.kit.contract import Contract, Route

_VERSIONED = re.compile(r"application/vnd\.([a-z]+)\.v(\d+)\+json", re.ASCII)
_SERVED = "1"
_REMEMBERED = 1024
_ANY_JSON = re.compile(r"(^|,)\s*(\*/\*|application/\*|application/json)\s*(;|,|$)", re.ASCII)
_PARAM = re.compile(r"[A-Za-z0-9._~-]{1,128}", re.ASCII)


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    param: _Node | None = None
    methods: dict[str, Route] = field(default_factory=dict)


class Paths:
    """The paths of one contract as a tree of segments; a written segment goes before a parameter."""

    def __init__(self, contract: Contract) -> None:
        self._root = _Node()
        for route in contract.routes:
            node = self._root
            for segment in (contract.base + route.path).split("/")[1:]:
                if segment.startswith("{"):
                    node.param = node = node.param or _Node()
                else:
                    node = node.children.setdefault(segment, _Node())
            if route.method in node.methods:
                raise ValueError(f"{contract.name}: {route.method} {route.path} is there twice")
            node.methods[route.method] = route

    def find(self, path: str) -> tuple[Mapping[str, Route], list[str]]:
        """The path's routes by method, and the values of its parameters. No such path: no routes."""
        node, values = self._root, []
        for segment in path.split("/")[1:]:
            child = node.children.get(segment)
            if child is None:
                child = node.param
                # An identifier of ours never needs quoting: nothing can be there, and services see clean ones only.
                if child is None or not _PARAM.fullmatch(segment):
                    return {}, []
                values.append(segment)
            node = child
        return node.methods, values


@dataclass(frozen=True, slots=True)
class Candidate:
    """A contract that may answer. Without a route it has only a refusal to say: other methods, or no such path."""

    contract: Contract
    route: Route | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    allowed: frozenset[str] = frozenset()
    served: bool = True  # False: the version that was asked for is not
    label: str = "none"  # the route's whole template


class Resolver:
    def __init__(self, contracts: Sequence[Contract], hosts: Mapping[str, str], defaults: Mapping[str, str]) -> None:
        """`hosts`: host name -> contract; `defaults`: base -> contract. Only the contracts given take part."""
        self._paths = {contract.name: (contract, Paths(contract)) for contract in contracts}
        self._param_names = {
            (contract.name, route.method, route.path): re.findall(r"\{(\w+)\}", route.path)
            for contract in contracts
            for route in contract.routes
        }
        self._hosts = {host.lower(): name for host, name in hosts.items() if name in self._paths}
        self._defaults = defaults
        self._sole = contracts[0].name if len(contracts) == 1 else None
        self.choose = lru_cache(_REMEMBERED)(self._choose)  # clients poll the same paths

    def _choose(self, method: str, path: str, host: str, accept: str) -> tuple[Candidate, ...]:
        """One candidate where the head of the request decides, else all that are left, the default first."""
        if method == "HEAD":
            method = "GET"
        name, inner = path[1:].partition("/")[0], path
        if name in self._paths:
            inner = path[len(name) + 1 :]
        elif (by_host := self._hosts.get(_host_name(host)) if self._hosts else None) is not None:
            name = by_host
        elif (by_accept := self._accepted(accept)) is not None:
            name = by_accept
        elif self._sole is not None:
            name = self._sole
        else:
            return self._by_path(method, path)
        candidate = self._find(name, method, inner)
        if "vnd." in accept and not _is_served(name, accept):
            return (Candidate(candidate.contract, served=False),)
        return (candidate,)

    def _by_path(self, method: str, path: str) -> tuple[Candidate, ...]:
        base = "/api/v1" if path.startswith("/api/v1/") else "/api"
        everyone = [self._find(name, method, path) for name in self._paths]
        default = self._defaults.get(base)
        everyone.sort(key=lambda candidate: candidate.contract.name != default)
        at_base = [candidate for candidate in everyone if candidate.contract.base == base] or everyone
        with_route = [candidate for candidate in everyone if candidate.route is not None]
        with_path = [candidate for candidate in everyone if candidate.allowed]
        return tuple(with_route or with_path or at_base)

    def _find(self, name: str, method: str, path: str) -> Candidate:
        contract, paths = self._paths[name]
        methods, values = paths.find(path)
        route = methods.get(method)
        if route is None:
            return Candidate(contract, allowed=frozenset(methods))
        names = self._param_names[name, route.method, route.path]
        params = dict(zip(names, values, strict=True)) if names else {}
        return Candidate(contract, route, params, label=contract.base + route.path)

    def _accepted(self, accept: str) -> str | None:
        if "vnd." not in accept:
            return None
        return next((name for name, _ in _VERSIONED.findall(accept) if name in self._paths), None)


def settle(
    candidates: Sequence[Candidate], token_contract: str | None, fields: Collection[str]
) -> tuple[Candidate, ...]:
    """Decide between several candidates, the default first, by the token's contract and a login's fields.

    More than one is left only for a login or registration that fits them all: its answer is their union.
    """
    if len(candidates) == 1:
        return tuple(candidates)
    by_token = [candidate for candidate in candidates if candidate.contract.name == token_contract]
    if by_token:
        return tuple(by_token)
    joints = [candidate.route.joint if candidate.route is not None else None for candidate in candidates]
    known_by = next((joint for joint in joints if joint is not None and joint in fields), None)
    if known_by is None:
        return (candidates[0],)
    return tuple(candidate for candidate, joint in zip(candidates, joints, strict=True) if joint == known_by)


def _is_served(name: str, accept: str) -> bool:
    versions = [version for contract, version in _VERSIONED.findall(accept) if contract == name]
    return not versions or _SERVED in versions or _ANY_JSON.search(accept) is not None


def _host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    return (host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower()

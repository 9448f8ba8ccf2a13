"""What every contract is built with."""

from controller.contracts.kit.accepts import best
from controller.contracts.kit.accesslog import AccessLog
from controller.contracts.kit.contract import JSON, Access, Call, Contract, Failure, Reply, Route
from controller.contracts.kit.failures import not_acceptable
from controller.contracts.kit.models import Id, Model, Secret, Text
from controller.contracts.kit.server import Api, HttpSettings
from controller.contracts.kit.times import GivenMoment, Moment, rfc3339

__all__ = [
    "JSON",
    "Access",
    "AccessLog",
    "Api",
    "Call",
    "Contract",
    "Failure",
    "GivenMoment",
    "HttpSettings",
    "Id",
    "Model",
    "Moment",
    "Reply",
    "Route",
    "Secret",
    "Text",
    "best",
    "not_acceptable",
    "rfc3339",
]

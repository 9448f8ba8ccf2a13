"""Enrolment against a real TLS server: the pin, the keys made here, a lost reply, refusals."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from agent import config
from agent.enrolment import enrol
from agent.errors import AgentError
from agent.identity import Identity
from shared.protocol import EnrolRefusal
from tests.agent.fake_controller import Authority, FakeController

FILES = {"agent.yaml", "node.key", "node.crt", "ca.crt", "wireguard.key", "wireguard.pub", "lock"}


async def test_enrolment_leaves_private_files_and_a_config_that_loads(tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    async with FakeController(tmp_path) as controller:
        answer = await enrol(controller.token(), directory)
        assert answer.name == "node-1"
        loaded = config.load(directory / "agent.yaml", {})
        assert (loaded.controller, loaded.directory) == (controller.address, directory)
        sent = controller.enrolments[0].wireguard_public_key
    assert {path.name for path in directory.iterdir()} == FILES
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir() if path.name != "lock"} == {0o600}
    identity = Identity(directory)
    assert identity.wireguard_key().public().raw == sent
    identity.tls(identity.current)


async def test_enrolling_again_keeps_the_operators_own_settings(tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    async with FakeController(tmp_path) as controller:
        await enrol(controller.token(), directory)
        path = directory / "agent.yaml"
        own = yaml.safe_load(path.read_text()) | {"controller": "192.0.2.1:1", "capacity_mbit": 10000, "later": 1}
        path.write_text(f"# ours\n{yaml.safe_dump(own)}")
        await enrol(controller.token(), directory)
        assert yaml.safe_load(path.read_text()) == own | {"controller": controller.address}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["a: [", "- a\n", "text"])
async def test_settings_that_cannot_be_kept_are_told_before_the_token_is_used(tmp_path: Path, text: str) -> None:
    directory = tmp_path / "agent"
    directory.mkdir(mode=0o700)
    (directory / "agent.yaml").write_text(text)
    async with FakeController(tmp_path) as controller:
        with pytest.raises(AgentError, match=r"agent\.yaml"):
            await enrol(controller.token(), directory)
        assert controller.enrolments == []
    assert (directory / "agent.yaml").read_text() == text


async def test_lost_reply_is_repeated_with_the_same_keys_and_gives_the_same_certificate(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        controller.lose_reply = True
        with pytest.raises(AgentError, match="cannot be reached"):
            await enrol(controller.token(), tmp_path / "agent")
        controller.lose_reply = False
        answer = await enrol(controller.token(), tmp_path / "agent")
        assert len(controller.answers) == 1
        assert answer in controller.answers.values()
        first, second = controller.enrolments
        assert first.wireguard_public_key == second.wireguard_public_key


async def test_controller_of_another_ca_learns_nothing(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        with pytest.raises(AgentError, match="not the one that the token names"):
            await enrol(controller.token(ca_pin=Authority().pin), tmp_path / "agent")
        assert controller.enrolments == []
    assert not (tmp_path / "agent/node.crt").exists()


async def test_refusal_is_told_in_the_controllers_words_without_the_secret(tmp_path: Path) -> None:
    async with FakeController(tmp_path) as controller:
        controller.refusal = EnrolRefusal(code="token_expired", message="the token expired 5 minutes ago")
        with pytest.raises(AgentError, match=r"token_expired.*5 minutes ago") as caught:
            await enrol(controller.token(), tmp_path / "agent")
        assert controller.token() not in str(caught.value)


async def test_controller_that_is_not_there_is_named(tmp_path: Path) -> None:
    controller = FakeController(tmp_path)
    controller.port = 1
    with pytest.raises(AgentError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await enrol(controller.token(), tmp_path / "agent")


@pytest.mark.parametrize("text", ["", "skyjoin1_", "skyjoin1_AAAA", "http://controller/"])
async def test_text_that_is_no_token_is_refused_before_anything_is_made(tmp_path: Path, text: str) -> None:
    with pytest.raises(AgentError, match="token"):
        await enrol(text, tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


async def test_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir(mode=0o755)
    async with FakeController(tmp_path) as controller:
        with pytest.raises(AgentError, match="chmod 700"):
            await enrol(controller.token(), tmp_path / "agent")
        assert controller.enrolments == []

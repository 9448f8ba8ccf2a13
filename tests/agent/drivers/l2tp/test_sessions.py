"""The records that pppd's hooks write, with the hooks themselves and a shell; and whose an interface is."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.l2tp.files import hooks
from agent.drivers.l2tp.links import PppLink
from agent.drivers.l2tp.processes import Process, started
from agent.drivers.l2tp.records import Records
from agent.drivers.l2tp.sessions import Final, Record, interfaces, parse_final, parse_record

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
RECORD = Record(BOOT, Process(40, 1000), "alice", "ppp0", "10.71.0.2", "192.0.2.2", 1_800_000_000)


def run_hook(directory: Path, name: str, interface: str = "lo", **environment: str) -> None:
    """As pppd runs it, for a session of this very process."""
    script = directory / name
    script.write_text(hooks()[name].replace("/etc/ppp/", f"{directory}/"))
    script.chmod(0o700)
    subprocess.run(
        [script, interface, "/dev/ppp", "0", "10.71.0.1", "10.71.0.2", "192.0.2.2"],
        env={"PPPD_PID": str(os.getpid()), "PEERNAME": "alice", "IFNAME": interface, "IPREMOTE": "10.71.0.2"}
        | environment,
        check=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sessions").mkdir()
    return tmp_path / "sessions"


def test_the_hook_writes_who_came_from_where(tmp_path: Path, folder: Path) -> None:
    run_hook(tmp_path, "ip-pre-up")
    (record,) = Records(folder, BOOT).read()
    own = Process(os.getpid(), started(os.getpid()) or 0)
    assert record == Record(BOOT, own, "alice", "lo", "10.71.0.2", "192.0.2.2", record.since)
    assert record.process.alive

    before = record.id
    run_hook(tmp_path, "ip-pre-up")  # IPCP may come up again within one session
    assert [each.id for each in Records(folder, BOOT).read()] == [before]


def test_the_hook_notes_the_counters_of_the_interface(tmp_path: Path, folder: Path) -> None:
    run_hook(tmp_path, "ip-pre-up")
    run_hook(tmp_path, "ip-down", BYTES_RCVD="7", BYTES_SENT="8")
    (record,) = Records(folder, BOOT).read()
    row = next(
        line.split() for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")
    )
    assert record.final is not None
    assert 0 <= record.final.rx <= int(row[1])
    assert (record.final.rx, record.final.tx) != (7, 8)


def test_the_hook_takes_pppds_own_counters_where_the_interface_is_gone(tmp_path: Path, folder: Path) -> None:
    run_hook(tmp_path, "ip-pre-up")
    run_hook(tmp_path, "ip-down", "gone0", BYTES_RCVD="4294967295", BYTES_SENT="8")
    (record,) = Records(folder, BOOT).read()
    assert record.final is not None
    assert (record.final.rx, record.final.tx) == (4294967295, 8)


def test_records_of_former_boots_go(tmp_path: Path, folder: Path) -> None:
    run_hook(tmp_path, "ip-pre-up")
    run_hook(tmp_path, "ip-down", BYTES_RCVD="1", BYTES_SENT="1")
    assert Records(folder, "another boot").read() == []
    assert list(folder.iterdir()) == []


def test_a_deleted_record_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    run_hook(tmp_path, "ip-pre-up")
    records = Records(folder, BOOT)
    (record,) = records.read()
    records.delete(record)
    run_hook(tmp_path, "ip-down", BYTES_RCVD="1", BYTES_SENT="1")  # its session was told as ended before
    assert records.read() == []
    assert list(folder.iterdir()) == []


def test_no_folder_is_no_records(tmp_path: Path) -> None:
    assert Records(tmp_path / "none", BOOT).read() == []


@given(st.text(max_size=60), st.text(max_size=200))
def test_anything_else_is_no_record(name: str, text: str) -> None:
    assert parse_record(name, text, 0, None) is None or text.endswith("end\n")
    assert parse_final(text, 0) is None or text.endswith("end\n")


def test_half_a_record_is_none_yet() -> None:
    whole = f"{BOOT}\nalice\nppp0\n10.71.0.2\n192.0.2.2\nend\n"
    assert parse_record("40-1000", whole, RECORD.since, None) == RECORD
    for length in range(len(whole)):
        assert parse_record("40-1000", whole[:length], 0, None) is None
    for length in range(len("12 34\nend\n")):
        assert parse_final("12 34\nend\n"[:length], 0) is None
    assert parse_final("12 34\nend\n", 5) == Final(12, 34, 5)


def test_ids_tell_boots_processes_and_interfaces_apart() -> None:
    others = [
        replace(RECORD, boot_id="another"),
        replace(RECORD, process=Process(41, 1000)),
        replace(RECORD, process=Process(40, 1001)),
        replace(RECORD, interface="ppp1"),
    ]
    assert len({record.id for record in [RECORD, *others]}) == 5
    assert replace(RECORD, final=Final(1, 2, 3)).id == RECORD.id
    assert len(RECORD.id) <= 64


def test_an_interface_that_came_back_is_the_youngers() -> None:
    links = {"ppp0": PppLink("ppp0", True, 1, 2)}
    older = replace(RECORD, process=Process(39, 900))
    elsewhere = replace(RECORD, process=Process(50, 2000), interface="ppp1")
    assert interfaces([RECORD, older, elsewhere], links) == {RECORD.id: links["ppp0"]}

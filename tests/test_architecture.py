"""Who may import whom. Each rule has its reason; a broken one is a design change, not a line to add here."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from controller.setup import initialise

ROOT = Path(__file__).parent.parent
ROOMS = ("access", "accounts", "desired", "events", "fleet", "tunnels", "usage")
CONTRACTS = ("irssh", "skynet")


@dataclass(frozen=True)
class Rule:
    where: str  # module prefix that the rule is about
    forbidden: tuple[str, ...]
    reason: str
    except_in: tuple[str, ...] = ()


RULES = [
    Rule("agent", ("controller",), "the two sides agree through shared/ only"),
    Rule("controller", ("agent",), "the two sides agree through shared/ only"),
    Rule("shared", ("agent", "controller", "aiohttp", "structlog", "asyncio"), "shared is pure: no side, no I/O"),
    Rule("", ("tests", "bench"), "the product does not know its tests", except_in=("tests", "bench")),
    Rule(
        "controller",
        ("controller.app",),
        "nothing knows the composition root but the command line",
        except_in=("controller.cli", "controller.app"),
    ),
    Rule(
        "controller",
        ("controller.services",),
        "a room gets the services that it needs from whoever joins the rooms",
        except_in=("controller.app", "controller.commands", "controller.services"),
    ),
    *(
        Rule(f"controller.{room}", ("aiohttp", "controller.contracts", "controller.channel"), "a use case has no HTTP")
        for room in (*ROOMS, "store")
    ),
    *(
        Rule(
            "controller",
            (f"controller.{room}.tables",),
            "a room's tables are its own; who else needs what is in them asks its service",
            except_in=(f"controller.{room}", "controller.store.schema"),
        )
        for room in (*ROOMS, "store")
    ),
    Rule(
        "controller.contracts",
        ("controller.channel", "controller.store", "controller.desired", "sqlalchemy"),
        "a contract is thin: services only",
    ),
    *(
        Rule(
            f"controller.contracts.{name}",
            ("aiohttp", *(f"controller.contracts.{other}" for other in CONTRACTS if other != name)),
            "contracts are siblings that know only the domain and the kit, which has all of HTTP",
        )
        for name in CONTRACTS
    ),
    Rule(
        "controller.contracts.kit",
        tuple(f"controller.contracts.{name}" for name in CONTRACTS),
        "the kit serves whatever contracts it is given",
    ),
    Rule("agent.plan", ("asyncio", "agent.drivers.wireguard", "aiohttp"), "the plan is pure"),
    Rule("agent.drivers", ("agent.link", "agent.reconciler", "agent.state", "aiohttp"), "a driver knows only the host"),
    Rule("agent", ("subprocess",), "processes start in one place", except_in=("agent.drivers.commands",)),
    Rule("controller", ("subprocess",), "the controller starts no process"),
]


def modules() -> dict[str, Path]:
    found = {}
    for top in ("agent", "controller", "shared"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that a search finds them"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.where or 'all'} not {rule.forbidden[0]}")
def test_import_rule(rule: Rule) -> None:
    broken = [
        f"{module} imports {name}"
        for module, path in modules().items()
        if within(module, rule.where) and not any(within(module, prefix) for prefix in rule.except_in)
        for name in sorted(imports(path))
        if any(within(name, prefix) for prefix in rule.forbidden)
    ]
    assert not broken, f"{rule.reason}: {broken}"


def test_the_rules_know_every_room_and_every_contract() -> None:
    def packages(folder: Path) -> set[str]:
        return {path.parent.name for path in folder.glob("*/__init__.py")}

    assert packages(ROOT / "controller") == {*ROOMS, "channel", "commands", "contracts", "store"}
    assert packages(ROOT / "controller" / "contracts") == {*CONTRACTS, "kit"}


def test_shared_imports_only_the_standard_library_keys_and_codec() -> None:
    allowed = {*sys.stdlib_module_names, "cryptography", "msgspec", "shared"}
    foreign = {
        f"{module}: {name}"
        for module, path in modules().items()
        if within(module, "shared")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    }
    assert not foreign


LISTED = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
WEB = {"aiohttp", "prometheus_client", "pydantic", "controller.app", "controller.contracts", "controller.channel"}
STORE = {"sqlalchemy", "alembic"}


def imported_by(*command: str) -> set[str]:
    """All modules that a process of ours has imported at its end."""
    program = [sys.executable, "-c", LISTED, *command]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(ended.stderr.split())


@pytest.mark.parametrize("command", ["controller user add", "agent run", "agent.client connect"])
def test_help_imports_neither_the_web_nor_the_store(command: str) -> None:
    assert not imported_by(*command.split(), "--help") & (WEB | STORE)


async def test_a_command_beside_the_controller_imports_no_web_and_no_migrations(tmp_path: Path) -> None:
    await initialise(tmp_path / "controller", None, None, None)
    found = imported_by("controller", "user", "list", "--config", str(tmp_path / "controller" / "controller.yaml"))
    assert "controller.services" in found
    assert not found & (WEB | {"alembic"})


IMPORTED = """
import importlib, sys
sys.dont_write_bytecode = True
busy = ("socket.", "sqlite3.", "subprocess.", "_thread.start", "os.mkdir", "os.remove", "os.rename", "os.fork")

def hook(event, given):
    if event.startswith(busy) or (event == "open" and set(str(given[1])) & set("wax+")):
        print(event, given, file=sys.stderr)

sys.addaudithook(hook)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_nothing_is_built_at_import_time() -> None:
    """No module opens, starts or writes anything by being imported."""
    named = [name for name in modules() if not name.endswith("__main__") and ".migrations." not in name]
    program = [sys.executable, "-c", IMPORTED, *named]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_shell_strings() -> None:
    """Data never meets a shell: only argument lists start programs."""
    banned = {"system", "popen", "create_subprocess_shell", "getoutput", "getstatusoutput"}
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                shell = any(keyword.arg == "shell" for keyword in node.keywords)
                if name in banned or shell:
                    found.append(f"{module}:{node.lineno}")
    assert not found


def test_every_module_says_what_it_is_for() -> None:
    silent = [module for module, path in modules().items() if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert not silent

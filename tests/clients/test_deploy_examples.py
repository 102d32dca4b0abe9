"""The examples for deployment pass their linters, agree with the server's options, and wait long enough at the end."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clients.conftest import Server
from tests.support.places import ROOT

DEPLOY = ROOT / "docs" / "examples" / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "cappy.service").read_text(encoding="utf-8")
MOST_EXPOSED = 20
"""What `systemd-analyze security` may find, in tenths: 14 is what it finds, and 92 what it finds without any option."""


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=variables or None)


def tool(name: str) -> str:
    """Find a linter, beside this Python or on the PATH; skips where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def documents() -> dict[str, dict[str, Any]]:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def pod() -> dict[str, Any]:
    return dict(documents()["Deployment"]["spec"]["template"]["spec"])


def container_of_pod() -> dict[str, Any]:
    return dict(pod()["containers"][0])


def settings() -> dict[str, dict[str, str]]:
    """Give the variables that each example sets."""
    in_image = re.findall(r"(?:^ENV|^   )\s+(\w+)=(\S+)", CONTAINERFILE, re.MULTILINE)
    in_unit = [
        word.split("=", 1) for line in re.findall(r"^Environment=(.*)$", UNIT, re.MULTILINE) for word in line.split()
    ]
    in_pod = {each["name"]: each["value"] for each in container_of_pod()["env"]}
    return {"Containerfile": dict(in_image), "cappy.service": dict(in_unit), "kubernetes.yaml": in_pod}


@pytest.fixture(scope="module")
def help_of_serve(cappy: str) -> str:
    return run(cappy, "serve", "--help").stdout


def instructions(name: str) -> list[str]:
    """List what stands behind an instruction of the Containerfile, with the lines that it goes on over."""
    return re.findall(rf"^{name} ((?:.*\\\n)*.*)$", CONTAINERFILE, re.MULTILINE)


def drain_seconds(help_of_serve: str) -> float:
    found = re.search(r"--drain-seconds.*?\[default: ([\d.]+)", help_of_serve, re.DOTALL)
    assert found
    return float(found[1])


# Linters


def test_hadolint_finds_nothing_in_the_containerfile() -> None:
    done = run(tool("hadolint"), "--no-color", DEPLOY / "Containerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_kubernetes_schemas_take_the_manifest() -> None:
    done = run(tool("kubernetes-validate"), "--strict", DEPLOY / "kubernetes.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed") == len(documents()) == 3


def test_systemd_takes_the_unit_and_finds_it_well_enclosed(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    unit = tmp_path / "cappy.service"
    unit.write_text(UNIT.replace("/opt/cappy/bin/cappy", "/bin/true"))  # it looks whether the command is there
    done = run(analyze, "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(analyze, "security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", unit)
    assert done.returncode == 0, done.stdout


# What they say of the server


@pytest.mark.parametrize("example", ["Containerfile", "cappy.service", "kubernetes.yaml"])
def test_every_variable_is_an_option_of_the_server(help_of_serve: str, example: str) -> None:
    names = [name for name in settings()[example] if name.startswith("CAPPY_SERVE_")]
    assert len(names) >= 3
    for name in names:
        flag = f"--{name.removeprefix('CAPPY_SERVE_').lower().replace('_', '-')}"
        assert re.search(rf"{flag}\b", help_of_serve), f"{example} sets {name}, and cappy serve has no {flag}"


def test_who_can_be_reached_by_others_asks_for_a_key() -> None:
    for example, variables in settings().items():
        assert variables["CAPPY_SERVE_API_KEY_FILE"], example


def test_all_wait_longer_than_the_server_drains(help_of_serve: str) -> None:
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert stop
    assert int(stop[1]) > drain_seconds(help_of_serve)
    before = shlex.join(container_of_pod()["lifecycle"]["preStop"]["exec"]["command"])
    pause = re.search(r"sleep\((\d+)\)", before)
    assert pause
    drains = float(settings()["kubernetes.yaml"]["CAPPY_SERVE_DRAIN_SECONDS"])
    assert pod()["terminationGracePeriodSeconds"] > int(pause[1]) + drains


def test_ports_and_probes_are_those_of_the_server() -> None:
    container = container_of_pod()
    assert str(container["ports"][0]["containerPort"]) == settings()["kubernetes.yaml"]["CAPPY_SERVE_PORT"]
    assert instructions("EXPOSE") == [settings()["Containerfile"]["CAPPY_SERVE_PORT"]]
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}


def test_key_files_are_where_the_server_looks_for_them() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of_pod()["volumeMounts"]}
    assert settings()["kubernetes.yaml"]["CAPPY_SERVE_API_KEY_FILE"] == f"{mounts['keys']}/keys"
    secrets = re.findall(r"^#.* --secret (\S+)", CONTAINERFILE, re.MULTILINE)
    assert [settings()["Containerfile"]["CAPPY_SERVE_API_KEY_FILE"]] == [f"/run/secrets/{name}" for name in secrets]
    credential = re.findall(r"^LoadCredential=(\w+):", UNIT, re.MULTILINE)
    assert [settings()["cappy.service"]["CAPPY_SERVE_API_KEY_FILE"]] == [f"%d/{name}" for name in credential]


def test_nobody_is_root() -> None:
    assert instructions("USER") == ["10001:10001"]
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert pod()["securityContext"]["runAsNonRoot"] is True
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT)
    assert unit["Service"]["DynamicUser"] == "yes"


# What is run


def test_the_start_and_the_health_check_need_no_shell() -> None:
    (start,) = instructions("ENTRYPOINT")
    assert json.loads(start) == ["/opt/cappy/bin/cappy", "serve"]
    assert instructions("CMD") == []
    assert health_check()[0] == "/opt/cappy/bin/python"


def health_check() -> list[str]:
    (check,) = instructions("HEALTHCHECK")
    return list(json.loads(check[check.index("[") :]))


def test_the_health_check_tells_a_server_that_is_ready_from_one_that_is_not(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    words = [sys.executable, *health_check()[1:]]
    assert run(*words, CAPPY_SERVE_PORT=port).returncode == 0
    assert run(*words, CAPPY_SERVE_PORT="1").returncode != 0
    # podman and docker give a container the proxy of the host.
    assert run(*words, CAPPY_SERVE_PORT=port, http_proxy="http://127.0.0.1:1").returncode == 0


def copied_files() -> set[str]:
    return {name for line in instructions("COPY") if not line.startswith("--from") for name in line.split()[:-1]}


def test_the_package_can_be_built_from_what_the_image_gets(tmp_path: Path) -> None:
    for name in copied_files():
        (tmp_path / name).symlink_to(ROOT / name)
    words = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "made", tmp_path)
    environment = {**os.environ, "CAPPY_BUILD": "none"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "made").glob("cappy_engine-*.whl"))) == 1


def test_the_image_gets_all_files_that_the_package_is_made_of() -> None:
    copied = copied_files()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = (\[.*\])$", project, re.MULTILINE)
    assert packages
    assert {path.partition("/")[0] for path in json.loads(packages[1])} <= copied
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "hatch_build.py"} <= copied
    lines = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied

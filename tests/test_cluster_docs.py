"""The manifests of docs/cluster.md: they are YAML, hang together, and their commands are ones that we understand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from frontend import flag_groups, flags
from ipc import auth

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "cluster.md").read_text()
RAY, PLAIN = (list(yaml.safe_load_all(block)) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))


def pods(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod specification of each Deployment, by name."""
    return {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"}


def test_services_find_pods_and_pods_find_their_volumes() -> None:
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in PLAIN if d["kind"] == "Deployment"]
    labels += [g["template"].get("metadata", {}).get("labels") for g in cluster_groups()]
    selectors = [d["spec"]["selector"] for d in RAY + PLAIN if d["kind"] == "Service"]
    assert len(selectors) == 3
    assert all(selector in labels for selector in selectors)
    specs = [*pods(PLAIN).values(), *(g["template"]["spec"] for g in cluster_groups())]
    for spec in specs:
        names = {volume["name"] for volume in spec["volumes"]}
        assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == names
    scaled = next(d for d in PLAIN if d["kind"] == "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"]
    assert scaled in pods(PLAIN)


def cluster_groups() -> list[dict[str, Any]]:
    spec = RAY[0]["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "has_client_keys", lambda folder: folder == "/keys")
    program, *argv = shlex.split(RAY[0]["spec"]["entrypoint"])
    options = flags.parse(argv)
    assert (program, options.cluster, options.max_replicas) == ("engine-launch", "ray", 8)
    for name, spec in pods(PLAIN).items():
        (container,) = spec["containers"]
        if container["command"] == ["engine-launch"]:
            arguments = [argument.replace("$(POD_IP)", "10.0.0.7") for argument in container["args"]]
            assert flags.parse(arguments).auth_keys == "/keys", name
        else:
            assert container["command"] == ["engine-frontend"]
            parser = flag_groups.FlagParser()
            for flag in ("--connect", "--auth-keys", "--tokenizer", "--host", "--port"):
                parser.add_argument(flag)
            flag_groups.http_flags(parser)
            assert parser.parse_args(container["args"]).connect == "tcp://tandem-directory:5757"


def test_there_is_time_to_drain_and_probes_ask_what_answers() -> None:
    drain_s = flags.parse(["m"]).shutdown_timeout
    specs = pods(PLAIN)
    for name in ("tandem-replica", "tandem-frontend"):
        assert specs[name]["terminationGracePeriodSeconds"] > drain_s + 5
    (frontend,) = specs["tandem-frontend"]["containers"]
    assert frontend["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8000}
    assert frontend["livenessProbe"]["httpGet"]["path"] == "/version"
    (replica,) = specs["tandem-replica"]["containers"]
    port = int(next(a for a in replica["args"] if a.startswith("tcp://$(POD_IP)")).rpartition(":")[2])
    assert replica["livenessProbe"]["tcpSocket"]["port"] == port + 1


def test_secrets_become_the_folder_of_keys_that_a_replica_needs(tmp_path: Path) -> None:
    """As kubectl collects them from what scripts/make_keys.py writes, and as the volume lays them out."""
    engine = tmp_path / "engine"
    auth.make_server_keys(engine)
    for name in ("replica", "frontend"):
        auth.make_client_keys(engine, name, tmp_path / name)
    secret = {p.name: p for folder in (engine, engine / "clients") for p in folder.iterdir() if p.is_file()}
    secret |= {name: tmp_path / "replica" / name for name in ("client.key", "client.key_secret")}
    for name in ("tandem-replica", "tandem-directory"):
        volume = next(v for v in pods(PLAIN)[name]["volumes"] if v["name"] == "keys")["secret"]
        assert volume["defaultMode"] == 0o400
        mounted = tmp_path / name
        for item in volume["items"]:
            place = mounted / item["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(secret[item["key"]].read_bytes())
            place.chmod(volume["defaultMode"])
        auth.load_server_keys(mounted)
        auth.load_client_keys(mounted)
        assert len(list((mounted / "clients").iterdir())) == 2

"""The files for `ray up` and the commands of Ray in the guide, against the Ray that is installed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.places import ROOT

from bioscan_jax.cli._command import shipped_configs
from bioscan_jax.devices.chips import CHIPS

FILES = sorted((ROOT / "configs").glob("fleet_*.yaml"))
GUIDE = (ROOT / "bioscan_jax" / "guide" / "fleet.md").read_text()


def test_cluster_files_are_not_offered_as_settings():
    assert [path.stem for path in FILES] == ["fleet_gpu", "fleet_tpu"]
    assert shipped_configs().keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml") if path not in FILES}


@pytest.mark.fleet
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_the_cluster_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(cluster)
    wrong = cluster | {"available_node_types": {"tpu": {"resources": {"TPU": 8}, "max_worker": 16}}}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(wrong)
    assert path.read_text().startswith(f"# ray up configs/{path.name}\n")


@pytest.mark.fleet
def test_the_tpus_have_as_many_chips_as_the_file_says():
    from ray._private.accelerators.tpu import TPUAcceleratorManager, get_num_tpu_visible_chips_per_host

    path = ROOT / "configs" / "fleet_tpu.yaml"
    node = yaml.safe_load(path.read_text())["available_node_types"]["tpu"]
    kind = node["node_config"]["acceleratorType"]
    assert TPUAcceleratorManager.is_valid_tpu_accelerator_type(kind)
    assert node["resources"] == {"TPU": get_num_tpu_visible_chips_per_host(kind)}
    assert get_num_tpu_visible_chips_per_host("v3-8") == 8 // CHIPS["v3"].cores_per_chip == 4


@pytest.mark.fleet
def test_the_guide_names_flags_that_ray_has():
    ray = Path(sys.executable).with_name("ray")
    commands = [
        shlex.split(line) for line in re.findall(r"(?m)^ {4,}(?:srun .*)?(ray [^#\n]+)", GUIDE.replace("\\\n", " "))
    ]
    assert {words[1] for words in commands} >= {"up", "exec", "down", "start", "symmetric-run"}
    for words in commands:
        # symmetric-run passes on the flags of `ray start`
        told = "".join(_help(ray, name) for name in {words[1], words[1].replace("symmetric-run", "start")})
        for flag in (word.split("=")[0] for word in words[2 : words.index("--") if "--" in words else None]):
            assert not flag.startswith("--") or flag in told, f"ray {words[1]} has no {flag}"


def _help(ray: Path, command: str) -> str:
    return subprocess.run([ray, command, "--help"], capture_output=True, text=True, check=True).stdout

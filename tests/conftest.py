"""Eight fake CPU devices for every test, set before JAX is imported; `-m device` takes the devices that are there."""

import os
import sys

import pytest

os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

# One cache of compiled programs for all tests, their child processes and later sessions.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/bioscan_jax/tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def _chosen(config: pytest.Config, marker: str) -> bool:
    """Returns whether `-m` asks for a marker."""
    return marker in config.option.markexpr.replace(f"not {marker}", "")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests of the real devices run in this process alone: it takes their memory."""
    if _chosen(config, "device"):
        config.option.numprocesses = 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses the devices; Hypothesis tries the same examples each time, and other ones where slow tests run."""
    assert "jax" not in sys.modules, "a plugin or a conftest.py imports JAX before its platform is chosen"
    if _chosen(config, "device"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

    import hypothesis  # the tests of the real devices do not need it

    hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("random" if _chosen(config, "slow") else "fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs property tests among the slow ones too, which is where they try other examples."""
    if _chosen(config, "slow"):
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker("slow")

import jax
import pytest

from bioscan_jax.devices.chips import CHIPS, Slice, find_slice, peak_flops
from bioscan_jax.errors import InputError


@pytest.mark.parametrize(
    ("name", "devices", "hosts", "topology"),
    [
        ("v3-8", 8, 1, "v3:2x2"),
        ("v3-32", 32, 4, "v3:4x4"),
        ("v4-8", 4, 1, "v4:2x2x1"),
        ("v4-32", 16, 4, "v4:2x2x4"),
        ("v5p-8", 4, 1, "v5p:2x2x1"),
        ("v5e-1", 1, 1, "v5e:1x1"),
        ("v5e-4", 4, 1, "v5e:2x2"),
        ("v5e-8", 8, 1, "v5e:2x4"),
        ("v5e-16", 16, 4, "v5e:4x4"),
        ("v5e-256", 256, 64, "v5e:16x16"),
        ("v6e-8", 8, 1, "v6e:2x4"),
    ],
)
def test_slices_for_rent(name, devices, hosts, topology):
    tpu = find_slice(name)
    assert (tpu.devices, tpu.hosts, tpu.topology[0]) == (devices, hosts, topology)
    assert tpu.host.hosts == 1
    assert tpu.host.devices * hosts == devices


def test_every_slice_has_the_cores_or_chips_of_its_name():
    for generation, chip in CHIPS.items():
        for number, shape in chip.slices.items():
            tpu = Slice(generation, shape)
            assert tpu.devices // chip.devices_per_chip * chip.cores_per_chip == number
            assert find_slice(f"{generation}-{number}") == tpu
            assert tpu.host.devices * tpu.hosts == tpu.devices


def test_a_v5e_8_is_one_host_of_eight_chips():
    assert find_slice("v5e-8").topology == ("v5e:2x4", {"chips_per_host_bounds": [2, 4, 1]})
    assert find_slice("v5e-16").host == find_slice("v5e-4")


def test_unknown_slices_are_refused():
    with pytest.raises(InputError, match=r"--topology 'v3-9' is not a known slice; use one of v3-8, v3-32, .*v3-512$"):
        find_slice("v3-9")
    for name in ("", "v9-8", "v3", "v3-", "v3-08", "v3-8 "):
        with pytest.raises(InputError, match="is not a known slice; use one of v3-8"):
            find_slice(name)


def test_peaks_are_per_jax_device_and_unknown_elsewhere():
    assert peak_flops("TPU v3") == 123e12 / 2
    assert peak_flops("TPU v4") == 275e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert len({chip.device_kind for chip in CHIPS.values()}) == len(CHIPS)

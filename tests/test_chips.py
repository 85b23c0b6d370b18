"""The topologies that can be planned, and the peaks and memory of their chips and cards."""

import pytest

from tiue_jax.plan import chips, gpus

V5E = chips.CHIPS["v5e"]


@pytest.mark.parametrize(
    ("topology", "kind", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v5e:16x16", "v5e", 256),
        ("v4:2x2x4", "v4", 16),
        ("h100:8", "h100", 8),
        ("l4:1", "l4", 1),
    ],
)
def test_topologies(topology, kind, count):
    chip, chips_count = chips.parse(topology)
    assert (chip.kind, chips_count) == (kind, count)


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:3x5", "v9:2x2", "", "v4:4x4", "v5e:4x4x1", "h100:3", "h100", "gpu:8", "rtx3090:1"]
)
def test_unknown_topology(topology):
    with pytest.raises(ValueError, match=r"unknown topology .*expected kind:shape among v4: 2x2x1.*v6e: 1x1") as error:
        chips.parse(topology)
    message = str(error.value)
    assert repr(topology) in message and len(message) <= 600
    assert message.endswith("; h100, h200, a100, a100-40gb, l4, rtx4090: 1, 2, 4, 8")


def test_the_memory_of_a_gpu_is_what_jax_takes(monkeypatch):
    whole = gpus.CARDS["h100"].memory_bytes
    monkeypatch.delenv(chips.MEMORY_FRACTION, raising=False)
    assert chips.parse("h100:8")[0].hbm_bytes == 0.75 * whole == 63_707_234_304
    monkeypatch.setenv(chips.MEMORY_FRACTION, ".95")
    assert chips.parse("h100:1")[0].hbm_bytes == int(0.95 * whole)
    assert chips.parse("v5e:4x4")[0].hbm_bytes == V5E.hbm_bytes
    for wrong in ("0", "1.5", "most", "-0.5"):
        monkeypatch.setenv(chips.MEMORY_FRACTION, wrong)
        with pytest.raises(ValueError, match=f"MEM_FRACTION must be a number above 0 and at most 1, got {wrong!r}"):
            chips.parse("h100:8")


def test_cards_are_plausible():
    """The peak is a power of two of multiply-adds in each cycle of a core, within a tenth. Otherwise a row is wrong."""
    for kind, card in gpus.CARDS.items():
        chip = chips.CHIPS[kind]
        adds = chip.peak_flops / 2 / card.cores / (card.clock_ghz * 1e9)
        assert any(abs(adds / 2**power - 1) < 0.1 for power in (8, 9, 10, 11)), (kind, adds)
        assert f"core_count: {card.cores}" in gpus.description(card) and card.name in gpus.description(card)
        assert card.capability >= (8, 0)  # bfloat16 and cuDNN attention


def test_clocks_are_plausible():
    """The clock is computed from the peak and the matrix units. Another range would mean a wrong row in the table."""
    clocks = {kind: chip.clock / 1e9 for kind, chip in chips.CHIPS.items() if chip.clock is not None}
    assert all(1.0 < clock < 1.8 for clock in clocks.values()), clocks

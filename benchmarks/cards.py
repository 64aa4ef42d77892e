"""What NVIDIA's cards can do at best."""

from typing import NamedTuple


class Card(NamedTuple):
    """flops: dense bfloat16 FLOP/s. bandwidth: byte/s of the HBM. hbm_gib: its GiB."""

    flops: float
    bandwidth: float
    hbm_gib: int


# NVIDIA's data sheets, of the SXM boards, by what the device's name contains.
CARDS = {
    "H100": Card(989e12, 3.35e12, 80),
    "H200": Card(989e12, 4.8e12, 141),
    "A100": Card(312e12, 2.04e12, 80),
}


def find_card(kind: str) -> Card | None:
    """The card of a `device_kind`; None where it is unknown here."""
    return next((card for name, card in CARDS.items() if name in kind), None)

"""Write–verify: the pulse response of a device, the closed loop, and its cheaper estimates."""

from aihwkit_lora.programming.estimates import write, write_mean, write_sampled
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.slots import WriteSlots
from aihwkit_lora.programming.write_verify import WriteResult, write_verify

__all__ = [
    "CellState",
    "PulseResponse",
    "WriteResult",
    "WriteSlots",
    "write",
    "write_mean",
    "write_sampled",
    "write_verify",
]

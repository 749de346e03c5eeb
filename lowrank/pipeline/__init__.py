"""The verbs: compress and plan, apply and decompress, calibrate, quantize; common `stages`."""

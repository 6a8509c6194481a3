"""Tests with torch_xla on the CPU, four virtual devices to a process: `scripts/test --xla`."""

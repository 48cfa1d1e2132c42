"""Engines that run a network: torch, which loads it, and OpenVINO and ONNX Runtime, which run what was exported from it."""

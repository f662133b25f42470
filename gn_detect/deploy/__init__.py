"""Trained detectors as ONNX files, and what runs these without PyTorch."""

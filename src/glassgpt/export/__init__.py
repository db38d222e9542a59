"""A model as one file for people without this package: `onnx.py`, `numpy.py`."""

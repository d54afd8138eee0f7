"""ONNX graphs on disk: their files, the arrays of each tensor, and their packings."""

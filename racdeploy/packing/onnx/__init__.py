"""ONNX graphs on the disk: their files, the arrays of each tensor, and their packings."""

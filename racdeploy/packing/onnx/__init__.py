"""ONNX graphs on the disk: their files, the arrays of each tensor, and what packings put in their place."""

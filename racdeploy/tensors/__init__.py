"""Layouts of other people's tensor files: safetensors, GGUF headers, ggml's types, MXFP4."""

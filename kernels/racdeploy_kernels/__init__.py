"""Libraries that racdeploy loads into llama.cpp and onnxruntime; there is nothing to import."""

"""Verification, benchmarks, signatures and distribution of finished bundles."""

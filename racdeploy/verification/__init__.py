"""Verification: ask models the same problems, and compare their answers with a reference's."""
